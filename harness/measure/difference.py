"""Two dumps against each other, in units of the noise that two correct ones may differ by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.measure.compare import measure_difference
from harness.measure.oracle import Oracle
from harness.measure.records import Measurement
from harness.measure.run import Case
from harness.measure.taps import Place
from harness.measure.traces import DEPLOYED, Dump


@dataclass
class _Stream:
    case: Case
    golden: Any = None
    orders: list[Any] = field(default_factory=list)


def differences(oracle: Oracle, a: Dump, b: Dump, cases: Sequence[Case]) -> Iterator[Measurement]:
    """Yield one measurement for each tap that both dumps hold, in order of evaluation.

    Parameters
    ----------
    oracle
        Golden and orders that make the noise.
    cases
        Those that both dumps hold, with the same ids.
    """
    import torch

    streams = [_Stream(case) for case in cases]
    part = oracle.part("embed")
    for stream in streams:
        ids = torch.from_numpy(np.array(stream.case.ids)).to(oracle.device)
        golden = part.embed(oracle.golden, ids)
        orders = [part.embed(order, ids) for order in oracle.orders]
        stream.golden = golden.pop("hidden")
        stream.orders = [order.pop("hidden") for order in orders]
        yield from _rows(a, b, stream.case.name, None, golden, orders)
    for layer in range(oracle.config.n_layers):
        part = oracle.part(layer)
        for stream in streams:
            golden, orders = _chain(part, oracle, stream)
            stream.golden = golden["output"]
            stream.orders = [order["output"] for order in orders]
            yield from _rows(a, b, stream.case.name, layer, golden, orders)
    part = oracle.part("head")
    for stream in streams:
        golden, orders = _chain(part, oracle, stream)
        golden[DEPLOYED] = golden["logits"]
        for order in orders:
            order[DEPLOYED] = order["logits"]
        yield from _rows(a, b, stream.case.name, None, golden, orders)


def _chain(part: Any, oracle: Oracle, stream: _Stream) -> tuple[dict[str, Any], list[Any]]:
    golden = part.chain(oracle.golden, stream.golden)
    pairs = zip(oracle.orders, stream.orders, strict=True)
    return golden, [part.chain(order, hidden) for order, hidden in pairs]


def _rows(
    a: Dump,
    b: Dump,
    case: str,
    layer: int | None,
    golden: Mapping[str, Any],
    orders: Sequence[Mapping[str, Any]],
) -> Iterator[Measurement]:
    for tap, truth in golden.items():
        place = Place(layer, tap)
        one, other = (dump.taps[case].get(place.path) for dump in (a, b))
        if one is None or other is None or not one.shape == other.shape == tuple(truth.shape):
            continue
        yield measure_difference(place, case, other, one, truth, [order[tap] for order in orders])
