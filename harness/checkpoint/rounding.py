"""Rounding weights to float16, and what it does to them.

bfloat16 has 65536 values, so what becomes of each is a table, and most need not be looked up. The
other types are rounded by NumPy and compared with what came out. Rounding is to nearest, ties to
even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

_BLOCK = 2**17  # elements; the temporaries of one block stay in the second-level cache
_MAGNITUDE, _SIGN = np.uint16(0x7FFF), np.uint16(0x8000)
_SMALLEST_NORMAL = np.uint16(0x3880)  # 2^-14
_LARGEST_FINITE = np.uint16(0x477F)  # 65280
_SHIFT = np.uint16(1 << 3)  # as a product: NumPy multiplies faster than it shifts
_REBIAS = np.uint16((127 - 15) << 10 & 0xFFFF)
_SPARSE = 16  # up to one element in so many is looked up alone; of more, all are
_INEXACT, _FLUSHED, _OVERFLOWED, _NOT_FINITE = 1, 2, 3, 4
_IN_ORDER_OF_COUNTS = (_OVERFLOWED, _FLUSHED, _INEXACT, _NOT_FINITE)
_NONE = np.empty(0, np.intp)


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


_ByCategory = np.ndarray[Any, np.dtype[np.int64]]
_Step = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], _ByCategory]


class Rounder:
    """Rounds arrays to float16, a cache-sized block at a time, in scratch memory of its own.

    For one thread. Memory that is allocated anew for every block costs more than the arithmetic.
    """

    def __init__(self) -> None:
        self._magnitude, self._scratch = np.empty((2, _BLOCK), np.uint16)
        self._outside = np.empty(_BLOCK, bool)

    def __call__(self, source: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Counts:
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
        if source.dtype == np.float16:
            out[:] = source
            bad = (out.view(np.uint16) & 0x7C00) == 0x7C00
            return Counts(not_finite=int(np.count_nonzero(bad)))
        step: _Step = _round_wide
        if source.dtype == ml_dtypes.bfloat16:
            source, out, step = source.view(np.uint16), out.view(np.uint16), self._round_bfloat16
        found = np.zeros(5, np.int64)
        for start in range(0, source.size, _BLOCK):
            stop = min(start + _BLOCK, source.size)
            found += step(source[start:stop], out[start:stop])
        return Counts(*(int(found[k]) for k in _IN_ORDER_OF_COUNTS))

    def _round_bfloat16(self, bits: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> _ByCategory:
        """Round by arithmetic where that is exact, by table elsewhere; elements by category.

        From 2^-14 to 65280 a bfloat16 is a normal float16: the eight bits of its significand fit
        into eleven, and the exponent fits after a change of bias from 127 to 15. On the bits of a
        magnitude that is a shift by 10 - 7 = 3 and a subtraction of (127 - 15) << 10, modulo 2^16.
        Most weights lie there, and this arithmetic is faster than the table.
        """
        results, categories = bfloat16_tables()
        size = bits.size
        m, s, o = self._magnitude[:size], self._scratch[:size], self._outside[:size]
        np.bitwise_and(bits, _MAGNITUDE, out=m)
        np.subtract(m, _SMALLEST_NORMAL, out=s)  # below it, this wraps to a large number
        np.greater(s, _LARGEST_FINITE - _SMALLEST_NORMAL, out=o)
        outside = np.count_nonzero(o)
        if outside > size // _SPARSE:
            out[:] = np.take(results, bits)
            return np.bincount(np.take(categories, bits), minlength=5)
        np.multiply(m, _SHIFT, out=m)
        np.subtract(m, _REBIAS, out=m)
        np.bitwise_and(bits, _SIGN, out=s)
        np.bitwise_or(m, s, out=out)
        rest = np.flatnonzero(o) if outside else _NONE
        special = bits[rest]
        out[rest] = results[special]
        return np.bincount(categories[special], minlength=5)


def _round_wide(block: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> _ByCategory:
    """Round float32 or float64; elements by category.

    Nearly every element changes, so that whole passes that count are faster than looking at those
    that do. A zero stays zero, an infinity infinite and a NaN a NaN: what there is more of after
    than before was flushed or overflowed. A NaN differs from itself.
    """
    out[:] = _narrow(block)
    magnitude = out.view(np.uint16) & _MAGNITUDE
    finite = np.count_nonzero(np.isfinite(block))
    overflowed = finite - np.count_nonzero(magnitude < 0x7C00)
    flushed = np.count_nonzero(block) - np.count_nonzero(magnitude)
    differing = np.count_nonzero(out.astype(block.dtype) != block)
    nans = np.count_nonzero(np.isnan(block)) if finite < block.size else 0
    found = np.zeros(5, np.int64)
    found[_INEXACT] = differing - overflowed - flushed - nans
    found[_FLUSHED], found[_OVERFLOWED] = flushed, overflowed
    found[_NOT_FINITE] = block.size - finite
    return found
