"""How much memory a check will take, said before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from harness.measure.run import Case
from harness.measure.taps import BLOCK_PREFIX, block_widths

_WIDE = 8
_NARROW = 4
# Chained and local results, their copies in float64, and what statistics need for a moment.
_COPIES = 4


def memory(
    config: Any, topology: Mapping[str, Sequence[int]], cases: Sequence[Case], orders: int
) -> int:
    """Return the bytes that the oracle's arrays take at their peak, beside the subject's own.

    One part of the model is held in float64 and in float32; the streams of all cases wait for the
    next part; and of one case at a time the widest tap exists as golden, as every order, as the
    subject's, several times over while statistics are taken.

    Parameters
    ----------
    config
        Sizes of the model.
    topology
        Tensor name to shape.
    cases
        Inputs.
    orders
        Number of evaluation orders, unrounded ones included.
    """
    parts: dict[str, int] = {}
    for name, shape in topology.items():
        inside = name.startswith(BLOCK_PREFIX + ".")
        part = name.removeprefix(BLOCK_PREFIX + ".").split(".")[0] if inside else "ends"
        parts[part] = parts.get(part, 0) + prod(shape)
    weights = max(parts.values()) * (_WIDE + _NARROW)
    positions = [int(case.ids.size) for case in cases]
    streams = sum(positions) * config.d_model * _WIDE * (orders + 2)
    every = sum(block_widths(config).values())
    widest = max(every, config.vocab_size)
    return int(weights + streams + max(positions) * widest * _WIDE * _COPIES * (orders + 2))


def size(amount: int) -> str:
    """Return a number of bytes as people say it."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"
