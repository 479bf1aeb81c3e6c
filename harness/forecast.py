"""How much memory a check will take, said before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.oracle import WIDENED
from harness.measure.paths import LENGTH, ROWS
from harness.measure.run import Case
from harness.measure.taps import BLOCK_PREFIX, block_widths

ORDERS = 8
"""Evaluation orders of a check, about: they are known for certain once the subject is there."""
_WIDE = 8
_NARROW = 4
# Chained and local results, their copies in float64, and what statistics need for a moment.
_COPIES = 4


def memory(
    config: Any, topology: Mapping[str, Sequence[int]], cases: Sequence[Case], orders: int = ORDERS
) -> int:
    """Return the bytes that the oracle's arrays take at their peak, beside the subject's own.

    One part of the model is held, in float32 and, where it is not large, in float64 too; the
    streams of all cases wait for the next part; and of one case at a time the widest tap exists as
    golden, as every order, as the subject's, several times over while statistics are taken.

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
    largest = max(_parts(topology).values())
    weights = largest * (_WIDE + _NARROW)
    if largest * _WIDE > WIDENED:
        # A tensor exists as it is stored, too, while the part is made; pieces are widened in turn.
        weights = largest * _NARROW + max(map(prod, topology.values())) * _WIDE
    positions = [int(case.ids.size) for case in cases]
    streams = sum(positions) * config.d_model * _WIDE * (orders + 2)
    every = sum(block_widths(config).values())
    widest = max(every, config.vocab_size)
    return int(weights + streams + max(positions) * widest * _WIDE * _COPIES * (orders + 2))


def _parts(topology: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of elements of each layer, and of the two ends together."""
    parts: dict[str, int] = {}
    for name, shape in topology.items():
        inside = name.startswith(BLOCK_PREFIX + ".")
        part = name.removeprefix(BLOCK_PREFIX + ".").split(".")[0] if inside else "ends"
        parts[part] = parts.get(part, 0) + prod(shape)
    return parts


def whole(config: Any, topology: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Return the bytes of a subject that holds all of its weights and runs every path.

    The largest of the paths are all the ways to split a few rows: their logits exist as the
    subject's, as the golden's and as every order's.
    """
    weights = sum(map(prod, topology.values())) * BY_NAME[dtype].numpy.itemsize
    length = min(LENGTH, config.max_seq_len)
    return int(weights + ROWS * length * length * config.vocab_size * _WIDE * (ORDERS + 3))


def streamed(topology: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Return the bytes of a subject that holds one layer or the ends, and what it is read from."""
    return 2 * max(_parts(topology).values()) * BY_NAME[dtype].numpy.itemsize


def size(amount: int) -> str:
    """Return a number of bytes as people say it."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"
