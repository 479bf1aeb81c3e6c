"""The golden and the evaluation orders, one part of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.statistics import Float
from harness.measure.widening import widened
from harness.measure.workers import each
from harness.subjects.protocol import Array, Rounding

if TYPE_CHECKING:
    from reference.config import MPTConfig
    from reference.orders import Order

Read = Callable[[str], Array]
Taps = Mapping[str, Any]
WIDENED = 2**26
"""Bytes of a part in float64 up to which it is held in float64 too. A larger one is held in float32
alone, exact for every storage dtype, and the golden widens a few rows at a time: a 7B block takes
0.8 GB instead of 2.4 GB."""
_PIECE = 2**22


def flat(tensor: Any) -> Float:
    """Return a torch tensor or array of any float dtype as float64 ``(rows, columns)``."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().to("cpu").double().numpy()
    array = widened(np.asarray(tensor))
    return array.reshape(-1, array.shape[-1])


def table(tensor: Any) -> Array:
    """Return a torch tensor or array as ``(rows, columns)`` in its own dtype, not to be written."""
    array = tensor.detach().to("cpu").numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
    return array.reshape(-1, array.shape[-1])


def stored(read: Read, dtype: str) -> Read:
    """Return ``read`` with every tensor rounded to ``dtype``, as a subject holds it."""
    target = BY_NAME[dtype].numpy

    def read_stored(name: str) -> Array:
        array = read(name)
        if array.dtype == target:
            return array
        result = np.empty(array.shape, target)
        source, rounded = array.reshape(-1), result.reshape(-1)
        with np.errstate(over="ignore"):
            for start in range(0, source.size, _PIECE):
                # float64 holds every source exactly and rounds to nearest once.
                piece = source[start : start + _PIECE].astype(np.float64)
                rounded[start : start + _PIECE] = piece.astype(target)
        return result

    return read_stored


@dataclass(frozen=True)
class Evaluation:
    """One tap as the golden, the orders and the unrounded evaluations have it, torch tensors."""

    golden: Any
    orders: tuple[Any, ...]
    unrounded: tuple[Any, ...]


class Part:
    """One block, the embedding or the head, with its weights.

    On the CPU a part of more than `WIDENED` bytes is held in float32 alone.
    """

    def __init__(self, oracle: Oracle, part: int | str) -> None:
        from reference import model

        def load(**options: Any) -> Any:
            if part == "embed":
                return model.embed_weights(oracle.config, oracle.read, **options)
            if part == "head":
                return model.head_weights(oracle.config, oracle.read, **options)
            return model.block_weights(oracle.config, int(part), oracle.read, **options)

        self._oracle = oracle
        self.part = part
        self.wide = self.narrow = load(dtype="float32", device=oracle.device)
        size = sum(tensor.numel() for tensor in self.narrow.values()) * 8
        if size <= WIDENED or oracle.device != "cpu":
            self.wide = _as(self.narrow, "float64")

    def _weights(self, order: Order) -> Any:
        return self.wide if order.compute == "float64" else self.narrow

    def step(self, tap: str, inputs: Taps) -> Evaluation:
        """Evaluate one step from given inputs, the same for the golden and every order."""
        from reference import model

        oracle = self._oracle

        def run(order: Order) -> Any:
            if self.part == "head":
                return model.head_step(oracle.config, order, self._weights(order), tap, inputs)
            return model.run_step(oracle.config, order, self._weights(order), tap, inputs)

        # The golden's own fusion decides nothing: it takes the predecessors of the declared order.
        asked = (oracle.golden_like, *oracle.orders, *oracle.unrounded)
        size = max(value.numel() for value in inputs.values())
        golden, *others = each(run, asked, size)
        count = len(oracle.orders)
        return Evaluation(golden, tuple(others[:count]), tuple(others[count:]))

    def chain(self, order: Order, hidden: Any) -> dict[str, Any]:
        """Evaluate every tap of the part from one stream."""
        from reference import model

        oracle = self._oracle
        if self.part == "head":
            return dict(model.head(oracle.config, order, self._weights(order), hidden))
        return dict(model.run_block(oracle.config, order, self._weights(order), hidden))

    def embed(self, order: Order, ids: Any) -> dict[str, Any]:
        """Evaluate the embedding; ``hidden`` is the stream into block 0."""
        from reference import model

        return dict(model.embed(self._oracle.config, order, self._weights(order), ids))

    def inputs_of(self, tap: str) -> tuple[str, ...]:
        """Return the taps a step is computed from under the declared rounding."""
        from reference import model

        oracle = self._oracle
        if self.part == "head":
            steps = model.head_steps(oracle.config, oracle.golden_like)
        else:
            steps = model.block_steps(oracle.config, oracle.golden_like)
        return next(step.inputs for step in steps if step.tap == tap)


def _as(weights: Any, dtype: str) -> Any:
    import torch

    return type(weights)({name: t.to(getattr(torch, dtype)) for name, t in weights.items()})


class Oracle:
    """The reference as the harness uses it.

    Parameters
    ----------
    config
        Parsed by the reference room.
    read
        Original tensor name to array, in the checkpoint's own dtype.
    storage
        The subject's storage dtype.
    rounding
        The subject's declared rounding points.
    device
        Where torch computes.
    """

    def __init__(
        self,
        config: MPTConfig,
        read: Read,
        *,
        storage: str,
        rounding: Rounding,
        device: str = "cpu",
    ) -> None:
        from dataclasses import replace

        from reference.orders import GOLDEN, legitimate_orders, noise_orders

        self.config = config
        self.storage = storage
        self.device = device
        self.read = stored(read, storage)
        self.golden = GOLDEN
        self.golden_like = replace(
            GOLDEN, residual=rounding.residual, activation=rounding.activation
        )
        every: Sequence[Order] = legitimate_orders(
            storage,  # type: ignore[arg-type]
            scores=rounding.scores,
            probabilities=rounding.probabilities,
            residual=rounding.residual,
            activation=rounding.activation,
            accumulator=rounding.accumulator,
        )

        # A sum term by term is slow to imitate and differs only where accumulation is not hidden by
        # the rounding of the storage dtype; the noise of accumulation has pieces of eight instead.
        self.orders: Sequence[Order] = tuple(
            order
            for order in every
            if storage == "float32" or not order.name.startswith("sequential")
        )
        self.unrounded: Sequence[Order] = noise_orders(
            scores=rounding.scores,
            probabilities=rounding.probabilities,
            residual=rounding.residual,
            activation=rounding.activation,
        )

    def part(self, part: int | str) -> Part:
        """Load one part: a layer number, ``"embed"`` or ``"head"``."""
        return Part(self, part)

    def first_stream(self, taps: Mapping[str, Array]) -> Array:
        """Return the stream into block 0 from a subject's embedding taps, rounded as declared.

        The protocol has no tap for it; with a single table and no embedding_fraction it is the tap.
        """
        from reference.ends import embed_step

        if not self.config.has_wpe and self.config.embedding_fraction == 1:
            return taps["transformer.wte"]
        inputs = {tap: self.tensor(array) for tap, array in taps.items()}
        return self.cast(embed_step(self.config, self.orders[0], "hidden", inputs))

    def cast(self, tensor: Any) -> Array:
        """Return a golden stream in the storage dtype, as a subject receives it."""
        target = BY_NAME[self.storage].numpy
        with np.errstate(over="ignore"):
            return np.asarray(tensor.detach().cpu().double().numpy()).astype(target)

    def tensor(self, array: Array) -> Any:
        """Return a subject's array as a float64 tensor on the oracle's device."""
        import torch

        # A copy even of float64: what the subject gave stays its own.
        return self.view(array).to(self.device).to(torch.float64, copy=True)

    def view(self, array: Array) -> Any:
        """Return an array as a tensor of its own dtype; only to be read, for it may be shared."""
        import torch

        given = np.ascontiguousarray(array)
        if given.dtype == BY_NAME["bfloat16"].numpy:
            plain = torch.from_numpy(given.view(np.int16)).view(torch.bfloat16)
        else:
            # A view of somebody else's memory is only read here.
            plain = torch.from_numpy(given if given.flags.writeable else given.copy())
        return plain.to(self.device)
