"""The Relax port as a subject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput, NotProven
from harness.measure.alibi import AttentionShape, probe_bias
from harness.subjects.protocol import Array, Rounding

if TYPE_CHECKING:
    from harness.faults.model import Planted
    from relax_impl.runtime import Model

ALIASES = ("lm_head.weight",)


class _WithoutAliases:
    """A checkpoint as the mapper sees it: a tied head stored twice is one tensor."""

    def __init__(self, checkpoint: Checkpoint, tied: bool) -> None:
        hidden = ALIASES if tied else ()
        self.tensors = tuple(t for t in checkpoint.tensors if t.name not in hidden)
        self.read = checkpoint.read


class Deployed:
    """The functions that a deployment calls: the plain forward and the paths over a cache.

    Parameters
    ----------
    model
        A compiled model with its weights.
    """

    protocol = 2

    def __init__(self, model: Model) -> None:
        from relax_impl.decoder import Decoder

        self._model = model
        self.decoder = Decoder(model)

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits by the deployed function, which has no taps.

        What stands after a row's end is seen by no position before it: ``lengths`` change nothing.
        """
        return self._model.forward(input_ids)

    def prefill(
        self, input_ids: Array, lengths: Array | None = None, starts: Array | None = None
    ) -> tuple[Array, Any]:
        """Return logits and a new cache that holds the prompts."""
        return self.decoder.prefill(input_ids, lengths, starts)

    def extend(self, state: Any, input_ids: Array, lengths: Array | None = None) -> Array:
        """Add tokens to every row of a cache and return their logits."""
        return self.decoder.extend(state, input_ids, lengths)

    def decode(self, state: Any, input_ids: Array) -> Array:
        """Add one token to every row of a cache and return what follows it."""
        return self.decoder.decode(state, input_ids)

    def fork(self, state: Any) -> Any:
        """Return a copy of a cache."""
        return state.fork()

    def truncate(self, state: Any, lengths: Array) -> Any:
        """Forget the positions of a cache from ``lengths`` on."""
        state.truncate(lengths)
        return state

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Return the context of given queries, keys and values, by the attention of layer 0."""
        return self._model.attend(q, k, v)


class Parts:
    """The compiled model with its weights, called part by part.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype, target
        Storage dtype; ``llvm``, ``cuda`` or a TVM target.
    fault
        A fault to plant.
    bundle
        Where the compiled model comes from, in place of a compiler.
    by_layer
        Hold the weights of one layer at a time.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        target: str,
        fault: Planted | None = None,
        bundle: Path | None = None,
        *,
        by_layer: bool = False,
    ) -> None:
        from relax_impl.compile import compile_model, default_roundings
        from relax_impl.config import MPTConfig
        from relax_impl.loader import lazy_parameters, mapping
        from relax_impl.runtime import Model

        opened = Checkpoint.open(checkpoint)
        true_config = MPTConfig.from_dict(opened.config)
        config = true_config
        if fault is not None and fault.fault.config is not None:
            config = fault.fault.config(config)
        operations = planted_operations(fault, target)
        library = (
            _of_bundle(bundle, config, dtype, target)
            if bundle is not None
            else compile_model(config, dtype, target, operations, whole=not by_layer)
        )
        if library.executable is None:
            raise NotProven(
                f"this machine has no {library.target} device",
                where=f"--target {target}",
                hint="nothing was compared",
            )
        weight_map = mapping(config, library.layout)
        if fault is not None and fault.fault.weights is not None:
            weight_map = fault.fault.weights(weight_map, config, fault.layer)
        reader = _WithoutAliases(opened, true_config.tie_word_embeddings)
        # One tensor at a time on its way to the device: the model is in memory once.
        parameters = lazy_parameters(config, reader, dtype, weight_map)
        self._model = Model(library, parameters, by_layer=by_layer)
        self._config = config
        places: dict[str, Any] = default_roundings(config, dtype, target)
        self.rounding = Rounding(**places)
        self.name = f"relax-{library.target}"
        self.dtype = dtype
        self.compile_cached = library.cached

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the embedding taps."""
        return self._model.embed(input_ids)

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        return self._model.block(layer, hidden_states)

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits."""
        return self._model.head(hidden_states)

    def attention_bias(self, query_length: int, key_length: int) -> Array:
        """Return the bias, measured through the attention kernel."""
        from relax_impl import alibi

        config = self._config
        shape = AttentionShape.of(config, self.dtype)
        rates = np.asarray(alibi.slopes(config), np.float64)
        return probe_bias(self._model.attend, shape, rates, query_length, key_length)

    def parameters(self) -> Mapping[str, Array]:
        """Return the parameters as tensors of the checkpoint: whatever was packed, unpacked."""
        return _Unpacked(self._model)


class RelaxSubject(Parts, Deployed):
    """The port as it is deployed: see `Parts` and `Deployed`."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        target: str,
        fault: Planted | None = None,
        bundle: Path | None = None,
    ) -> None:
        Parts.__init__(self, checkpoint, dtype, target, fault, bundle)
        Deployed.__init__(self, self._model)
        if fault is not None and fault.fault.calls is not None:
            fault.fault.calls(self)


class StreamedRelaxSubject(Parts):
    """The port with the weights of one layer in memory; each is read when it is called.

    `forward` calls the blocks one by one, without taps. A cache over all layers is not held, so
    that the paths over one are left out.
    """

    protocol = 2
    left_out = dict.fromkeys(
        ("prefill", "extend", "decode", "fork", "truncate"),
        "block by block there is no cache over all layers",
    )

    def __init__(
        self, checkpoint: Path, dtype: str, target: str, fault: Planted | None = None
    ) -> None:
        if fault is not None and fault.fault.calls is not None:
            raise BadInput(
                "this fault is in calls that are not made block by block", where="--fault",
                found=fault.label, hint="check the whole model with --no-stream",
            )  # fmt: skip
        super().__init__(checkpoint, dtype, target, fault, by_layer=True)

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits, layer by layer, by functions that have no taps."""
        return self._model.forward(input_ids)

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Return the context of given queries, keys and values, by the attention of layer 0."""
        return self._model.attend(q, k, v)


class _Unpacked(Mapping[str, Array]):
    """Parameters under their names, each fetched and unpacked when it is asked for.

    All at once would need the memory of the model a second time.
    """

    def __init__(self, model: Model) -> None:
        from relax_impl.topology import topology

        self._held = model.weights
        self._layout = model.library.layout
        self._shapes = topology(model.config)

    def __getitem__(self, name: str) -> Array:
        stored, shape = self._held[name].numpy(), self._shapes[name]
        if len(shape) != 2:
            return np.asarray(stored)
        return unpacked(stored, shape, self._layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def unpacked(stored: Array, shape: tuple[int, ...], layout: Any) -> Array:
    """Return a matrix of ``shape`` from its storage order.

    Raises
    ------
    ValueError
        If packing the result again does not give ``stored``: then it is no packing of a matrix of
        this shape, as where the padding is not zero.
    """
    if not layout.width:
        return np.asarray(stored)
    # Panels of rows, [panel, column, row within it], the last one filled up.
    matrix = stored.transpose(0, 2, 1).reshape(-1, stored.shape[1])[: shape[0]]
    again = layout.store(matrix)
    bits = f"u{stored.dtype.itemsize}"
    if again.shape != stored.shape or not np.array_equal(again.view(bits), stored.view(bits)):
        raise ValueError(f"the stored array {stored.shape} is no packed matrix of shape {shape}")
    return np.ascontiguousarray(matrix)


def planted_operations(fault: Planted | None, target: str) -> Any:
    """Return layer -> building blocks, or ``None`` for the target's own.

    What a fault does not touch is what is deployed: the target's own kernels.
    """
    if fault is None or fault.fault.operations is None:
        return None
    from relax_impl.compile import default_operations

    healthy = default_operations(target)
    faulty = fault.fault.operations(healthy)

    def choose(layer: int) -> Any:
        return faulty if fault.layer is None or layer == fault.layer else healthy

    return choose


def _of_bundle(path: Path, config: Any, dtype: str, target: str) -> Any:
    from relax_impl.bundle import BundleError, open_bundle

    if target not in ("llvm", "cuda"):
        raise BadInput("expected llvm or cuda with a bundle", where="--target", found=repr(target))
    try:
        return open_bundle(path, config, dtype, target)
    except BundleError as error:
        raise BadInput(str(error), where="--bundle") from error


def load(
    checkpoint: Path,
    *,
    dtype: str,
    target: str,
    fault: Planted | None = None,
    bundle: Path | None = None,
    stream: bool = False,
) -> RelaxSubject | StreamedRelaxSubject:
    """Make the subject, with the weights of one layer at a time if it is streamed.

    Raises
    ------
    BadInput
        If the target is not one TVM knows.
    NotProven
        If the machine has no device for it.
    """
    from relax_impl.target import resolve

    try:
        resolve(target)
    except Exception as error:
        # TVM has a type of its own for every way in which a target can be wrong.
        reason = str(error).strip().splitlines()[-1].removeprefix("target: ")
        raise BadInput(
            f"this is no target: {reason}", where="--target", found=repr(target)
        ) from error
    if stream:
        return StreamedRelaxSubject(checkpoint, dtype, target, fault)
    return RelaxSubject(checkpoint, dtype, target, fault, bundle)
