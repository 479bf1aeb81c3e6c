"""Rounding weights to float16, and what it does to them.

bfloat16 has 65536 values, so its conversion is a table of 65536 results, with a second table of
what happens to each; the other types are rounded by NumPy and compared with what came out. Both
round to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

_BLOCK = 2**17  # elements; the temporaries of one block stay in the second-level cache
_INEXACT, _FLUSHED, _OVERFLOWED, _NOT_FINITE = 1, 2, 3, 4


@dataclass(frozen=True)
class Counts:
    """Elements by what rounding to float16 does to them; an element counts once, or not at all.

    Attributes
    ----------
    overflowed
        Finite before, infinite after.
    flushed
        Not zero before, zero after.
    inexact
        Another value after than before, but neither of the above.
    not_finite
        Infinite or NaN already before.
    """

    overflowed: int = 0
    flushed: int = 0
    inexact: int = 0
    not_finite: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Counts of both together."""
        return Counts(
            self.overflowed + other.overflowed,
            self.flushed + other.flushed,
            self.inexact + other.inexact,
            self.not_finite + other.not_finite,
        )

    def __bool__(self) -> bool:
        """Whether anything but exact conversion happened."""
        return self != Counts()


def _categories(
    before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Category of every element, given the wide values before and float16 after."""
    widened = after.astype(before.dtype)
    found = np.where(widened != before, _INEXACT, 0).astype(np.uint8)
    found[(after == 0) & (before != 0)] = _FLUSHED
    found[np.isinf(after) & np.isfinite(before)] = _OVERFLOWED
    found[~np.isfinite(before)] = _NOT_FINITE
    return found


def _narrow(wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return wide.astype(np.float16)


@cache
def bfloat16_tables() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Result (bits of a float16, uint16) and category (uint8) by the bits of a bfloat16."""
    wide = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    narrow = _narrow(wide)
    return narrow.view(np.uint16), _categories(wide, narrow)


def _count(categories: np.ndarray[Any, np.dtype[np.uint8]]) -> Counts:
    if not np.count_nonzero(categories):
        return Counts()
    of = [int(np.count_nonzero(categories == k)) for k in range(5)]
    return Counts(of[_OVERFLOWED], of[_FLUSHED], of[_INEXACT], of[_NOT_FINITE])


def round_to_float16(source: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Counts:
    """Round `source` into `out`.

    Parameters
    ----------
    source
        One-dimensional bfloat16, float16, float32 or float64.
    out
        One-dimensional float16 of the same length; overwritten.

    Returns
    -------
    Counts
        What happened to the elements.
    """
    counts = Counts()
    for start in range(0, source.size, _BLOCK):
        block = source[start : start + _BLOCK]
        counts += _round_block(block, out[start : start + block.size])
    return counts


def _round_block(block: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Counts:
    if block.dtype == ml_dtypes.bfloat16:
        results, categories = bfloat16_tables()
        bits = block.view(np.uint16)
        # Every index is in range; "wrap" lets NumPy write to `out` without a copy of its own.
        np.take(results, bits, out=out.view(np.uint16), mode="wrap")
        return _count(np.take(categories, bits, mode="wrap"))
    if block.dtype == np.float16:
        out[:] = block
        bad = (block.view(np.uint16) & 0x7C00) == 0x7C00
        return Counts(not_finite=int(np.count_nonzero(bad)))
    out[:] = _narrow(block)
    changed = np.flatnonzero((out.astype(block.dtype) != block) | ~np.isfinite(block))
    return _count(_categories(block[changed], out[changed])) if changed.size else Counts()
