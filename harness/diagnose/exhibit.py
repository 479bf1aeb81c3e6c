"""The tap that diverged first, once more: what the subject was given and what it made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.diagnose.steps import PartName
from harness.measure.alibi import Attend, AttentionShape, from_diagonal, probe_bias
from harness.measure.compare import measure_bias, measure_tap
from harness.measure.oracle import Oracle, flat
from harness.measure.order_bias import expected_slopes, probe_order, reference_bias
from harness.measure.records import Measurement
from harness.measure.run import Case
from harness.measure.statistics import Float, noise_scale, row_noise, ulp
from harness.measure.taps import (
    BLOCK_PREFIX,
    Place,
    block_widths,
    embed_widths,
    head_widths,
    shapes,
)
from harness.measure.workers import each
from harness.subjects.calls import call_bias, call_taps
from harness.subjects.protocol import Array

Taps = Mapping[str, Array]


@dataclass(frozen=True)
class Exhibit:
    """One tap as a subject has it.

    Attributes
    ----------
    part, layer, tap
        Where; ``attend`` for the bias that the attention applies.
    inputs
        What the sub-module was given, by tap.
    observed, golden, orders
        What it made of it, and what it should have made.
    noise
        From a golden to the error that is expected of each element then, ``(rows, columns)``.
    measure
        From observed and golden to a measurement.
    probe
        For ``attend``: from an attention to its table of biases.
    """

    part: PartName
    layer: int | None
    tap: str
    inputs: Taps
    observed: Float
    golden: Float
    orders: tuple[Float, ...]
    noise: Callable[[Float], Float]
    measure: Callable[[Float, Float], Measurement]
    probe: Callable[[Any], Float] | None = None


class Witness:
    """Asks a subject, or a dump of one, for the taps of one case.

    Parameters
    ----------
    oracle
        Golden and orders.
    subject
        Is asked, unless there is a dump.
    case
        Its token ids.
    dumped
        Taps by path, in place of a subject.
    """

    def __init__(
        self, oracle: Oracle, subject: Any, case: Case, dumped: Taps | None = None
    ) -> None:
        self.oracle, self.subject, self.case, self._dumped = oracle, subject, case, dumped

    def part(self, part: PartName, layer: int | None) -> dict[str, Array]:
        """Return the taps of a part, with the stream into it under ``input``.

        Raises
        ------
        SubjectFailure
            If the subject fails.
        KeyError
            If a dump lacks the taps.
        """
        if part == "embed":
            return {"ids": self.case.ids, **self._taps("embed", (self.case.ids,), "")}
        hidden = self._stream(self.oracle.config.n_layers if layer is None else int(layer))
        if part == "head":
            return {"input": hidden, **self._taps("head", (hidden,), "")}
        prefix = f"{BLOCK_PREFIX}.{layer}."
        return {"input": hidden, **self._taps("block", (layer, hidden), prefix)}

    def _stream(self, layer: int) -> Array:
        hidden = self.oracle.first_stream(self._first())
        for index in range(layer):
            hidden = self._taps("block", (index, hidden), f"{BLOCK_PREFIX}.{index}.")["output"]
        return hidden

    def _first(self) -> Taps:
        if self._dumped is not None or hasattr(self.subject, "embed"):
            return self._taps("embed", (self.case.ids,), "")
        import torch

        ids = torch.from_numpy(np.array(self.case.ids)).to(self.oracle.device)
        taps = self.oracle.part("embed").embed(self.oracle.golden, ids)
        names = embed_widths(self.oracle.config)
        return {name: self.oracle.cast(taps[name]) for name in names}

    def _taps(self, method: str, arguments: tuple[Any, ...], prefix: str) -> dict[str, Array]:
        config = self.oracle.config
        widths = {"embed": embed_widths, "block": block_widths, "head": head_widths}[method](config)
        if self._dumped is not None:
            return {tap: self._dumped[prefix + tap] for tap in widths}
        batch, length = self.case.ids.shape
        return call_taps(
            method, getattr(self.subject, method), arguments, shapes(widths, batch, length)
        )


def exhibit(witness: Witness, place: Place) -> Exhibit:
    """Return one tap from its own inputs.

    Parameters
    ----------
    witness
        Knows the subject and the case.
    place
        A tap of the embedding, of a block or of the head.
    """
    oracle, tap = witness.oracle, place.tap
    part: PartName = "block"
    if place.layer is None:
        part = "embed" if tap in embed_widths(oracle.config) else "head"
    taps = witness.part(part, place.layer)
    golden, orders, unrounded = _evaluated(oracle, part, place, taps, witness.case)
    truth = flat(golden)
    others, wide = tuple(map(flat, orders)), tuple(map(flat, unrounded))
    array = taps[tap]

    storage = oracle.storage
    within = noise_scale(truth, others, storage, wide)
    # What accumulation adds, where it adds most. A fault moves it to other rows and columns, and
    # makes it larger where it makes the values larger.
    added = float(np.sqrt(np.maximum(within**2 - ulp(truth, storage) ** 2 / 12.0, 0.0).max()))

    size = _size(truth)

    def accumulation(expected: Float) -> float:
        return added * max(1.0, _size(expected) / size) if size > 0 else added

    def noise(expected: Float) -> Float:
        result: Float = np.hypot(ulp(expected, storage) / np.sqrt(12.0), accumulation(expected))
        return result

    def measure(seen: Float, expected: Float) -> Measurement:
        return measure_tap(
            "local", place, witness.case.name, seen.reshape(array.shape), expected,
            [order + (expected - truth) for order in others], storage,
            unrounded=[expected + accumulation(expected)],
        )  # fmt: skip

    return Exhibit(part, place.layer, tap, taps, flat(array), truth, others, noise, measure)


def _size(values: Float) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _evaluated(
    oracle: Oracle, part: PartName, place: Place, taps: Taps, case: Case
) -> tuple[Any, Any, Any]:
    if part == "embed":
        import torch

        ids = torch.from_numpy(np.array(case.ids)).to(oracle.device)
        embedding = oracle.part("embed")
        return (
            embedding.embed(oracle.golden, ids)[place.tap],
            [embedding.embed(order, ids)[place.tap] for order in oracle.orders],
            (),
        )
    named = oracle.part("head" if place.layer is None else place.layer)
    needed = named.inputs_of(place.tap)
    given = {"hidden": taps["input"], **taps}
    truth = named.step(place.tap, {name: oracle.tensor(given[name]) for name in needed})
    return truth.golden, truth.orders, truth.unrounded


def bias_exhibit(oracle: Oracle, subject: Any, queries: int, keys: int) -> Exhibit:
    """Return the bias that a subject's attention applies, relative to each query's own key.

    Parameters
    ----------
    oracle
        Golden and orders.
    subject
        Offers ``attention_bias``.
    queries, keys
        Size of the table.
    """
    config = oracle.config
    shape = AttentionShape.of(config, oracle.storage)

    def table(run: Attend) -> Float:
        return from_diagonal(probe_bias(run, shape, expected_slopes(config), queries, keys))

    def rows(bias: Float) -> Float:
        return np.ascontiguousarray(bias).reshape(-1, keys)

    golden = from_diagonal(reference_bias(config, queries, keys))
    seen = call_bias(subject, config.n_heads, queries, keys)
    observed = from_diagonal(np.broadcast_to(seen, golden.shape).astype(np.float64))
    orders = each(
        lambda order: from_diagonal(probe_order(oracle, order, queries, keys)),
        oracle.orders,
        golden.size,
    )

    flattened = tuple(rows(order) for order in orders)
    truth = rows(golden)
    by_row = row_noise(truth, flattened)
    # A fault exchanges heads, and with them which of them is measured worst.
    worst = np.broadcast_to(by_row.max(), truth.shape)

    def measure(seen: Float, expected: Float) -> Measurement:
        even = [expected + (order - truth) * (worst / by_row) for order in flattened]
        shaped = [array.reshape(golden.shape) for array in (seen, expected, *even)]
        return measure_bias("bias", shaped[0], shaped[1], shaped[2:], oracle.storage)

    return Exhibit(
        "attend", 0, "alibi", {}, rows(observed), truth, flattened, lambda _: worst, measure,
        probe=lambda run: rows(table(run)),
    )  # fmt: skip
