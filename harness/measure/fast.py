"""A first look at a large error tensor: the seven statistics in float32, and their uncertainty.

What is proved to lie within its limits here needs no second look; only what comes close, or fails,
is worth the exact statistics in float64. One pass in blocks that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.measure.statistics import (
    _FRACTION_BITS,
    _MIN_EXPONENT,
    STATISTICS,
    Float,
    Statistics,
)

BLOCK = 1 << 15
"""Elements of a block: five buffers of float32 in less than a megabyte."""
CHUNK = 256
"""Terms that are summed in float32; the sums of chunks are summed in float64."""
_UNIT = 2.0**-24
"""Unit roundoff of float32."""
# Per element: the golden and the observed each rounded once, subtraction, three operations for the
# noise, a division and two products. Each is within one unit roundoff of its operands.
_STEPS = 10
# The exponent field of a float32, sign and fraction masked away: the power of two below a value.
_EXPONENT = np.int32(0x7F800000)

Share = tuple[Float, Float]
"""A variance as the product of a row's ``(rows,)`` and a column's ``(columns,)`` share."""


@dataclass(frozen=True)
class Screen:
    """Statistics in float32 and how far each may be from its exact value."""

    statistics: Statistics
    slack: Mapping[str, float]

    def within(self, limits: Mapping[str, float]) -> bool:
        """Return whether every statistic is proved to lie within its limit."""
        return all(
            self.statistics.get(name) + self.slack[name] <= limits[name] for name in STATISTICS
        )


def screen(
    observed: NDArray[Any], golden: NDArray[Any], dtype: str, shares: Sequence[Share] = ()
) -> Screen:
    """Return the statistics of ``observed - golden`` and their uncertainty.

    Parameters
    ----------
    observed, golden
        ``(rows, columns)``, any float dtype.
    dtype
        Storage dtype, whose rounding is the noise: ``"float16"`` or ``"bfloat16"``. In float32
        there would be nothing left to see the rounding of float32 with.
    shares
        What joins the variance of that rounding at each element.

    Raises
    ------
    ValueError
        If ``dtype`` is not one of the two.
    """
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype: expected float16 or bfloat16, found {dtype!r}")
    rows, columns = golden.shape
    sums = _Sums(rows, columns)
    height = max(1, BLOCK // columns)
    work = _Work(height, columns)
    narrow = [(row.astype(np.float32), column.astype(np.float32)) for row, column in shares]
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, rows, height):
            part = slice(at, min(at + height, rows))
            work.load(observed[part], golden[part], dtype, [(r[part], c) for r, c in narrow])
            sums.add(part, work, part.stop - part.start)
    return sums.finish(dtype)


class _Work:
    """The buffers of one block."""

    def __init__(self, height: int, columns: int) -> None:
        # Whole chunks: what lies beyond the columns stays zero, and adds nothing.
        shape = (height, -(-columns // CHUNK) * CHUNK)
        self.columns = columns
        self.error, self.golden, self.noise, self.spare, self.power = (
            np.zeros(shape, np.float32) for _ in range(5)
        )

    def load(
        self, observed: NDArray[Any], golden: NDArray[Any], dtype: str, shares: Sequence[Any]
    ) -> None:
        """Fill ``error`` with the error and ``golden`` with the golden, both over the noise."""
        n = len(golden)
        error, truth, noise, spare, power = (
            buffer[:n] for buffer in (self.error, self.golden, self.noise, self.spare, self.power)
        )
        inside = np.s_[:, : self.columns]
        np.copyto(error[inside], observed, casting="same_kind")
        np.copyto(truth[inside], golden, casting="same_kind")
        error -= truth
        np.bitwise_and(truth.view(np.int32), _EXPONENT, out=noise.view(np.int32))
        np.maximum(noise, np.float32(2.0 ** _MIN_EXPONENT[dtype]), out=noise)
        # The rounding is this power of two over `scale`, which is applied last: before, it would
        # take the least noise of bfloat16 out of the range of float32.
        scale = 2.0 ** _FRACTION_BITS[dtype] * math.sqrt(12.0)
        if shares:
            np.copyto(power, noise)
            np.multiply(noise, noise, out=noise)
            for row, column in shares:
                np.multiply(row[:, None] * np.float32(scale**2), column, out=spare[inside])
                noise[inside] += spare[inside]
            np.sqrt(noise, out=noise)
            # The square of a small power is zero.
            np.maximum(noise, power, out=noise)
        np.divide(np.float32(1.0), noise, out=noise)
        for value in (error, truth):
            value *= noise
            value *= np.float32(scale)


class _Sums:
    """Sums over rows, columns and everything."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row_squares, self.row_sums = np.empty(rows), np.empty(rows)
        self.column_squares, self.column_sums = np.zeros(columns), np.zeros(columns)
        self.tail, self.along, self.length, self.bad = 0.0, 0.0, 0.0, -1
        self._ones = np.ones(CHUNK, np.float32)

    def _by_row(self, values: NDArray[np.float32]) -> Float:
        chunks = (values.reshape(-1, CHUNK) @ self._ones).reshape(len(values), -1)
        result: Float = chunks.sum(axis=1, dtype=np.float64)
        return result

    def add(self, part: slice, work: _Work, n: int) -> None:
        error, truth, squares = work.error[:n], work.golden[:n], work.spare[:n]
        ones = np.ones(n, np.float32)
        high, low = float(error.max()), float(error.min())
        if not math.isfinite(high + abs(low)) and self.bad < 0:
            self.bad = part.start + int(np.argmax(~np.isfinite(error).all(axis=1)))
        self.tail = max(self.tail, high, -low)
        self.row_sums[part] = self._by_row(error)
        self.column_sums += (ones @ error)[: self.columns]
        np.multiply(error, error, out=squares)
        self.row_squares[part] = self._by_row(squares)
        self.column_squares += (ones @ squares)[: self.columns]
        np.multiply(error, truth, out=squares)
        self.along += float(self._by_row(squares).sum())
        np.multiply(truth, truth, out=squares)
        self.length += float(self._by_row(squares).sum())

    def finish(self, dtype: str) -> Screen:
        rows, columns = self.rows, self.columns
        if self.bad >= 0 or not math.isfinite(float(self.row_squares.sum()) + self.length):
            # Not finite, or beyond float32: nothing is known but that it is not small.
            worst = self.bad if self.bad >= 0 else int(np.argmax(self.row_squares))
            infinite = Statistics(*(math.inf,) * 7, worst_row=worst)
            return Screen(infinite, dict.fromkeys(STATISTICS, math.inf))
        size = rows * columns
        row = np.sqrt(self.row_squares / columns)
        length = math.sqrt(self.length)
        found = Statistics(
            rms=math.sqrt(float(self.row_squares.sum()) / size),
            row=float(row.max()),
            column=math.sqrt(float(self.column_squares.max()) / rows),
            tail=self.tail,
            row_bias=float(np.abs(self.row_sums).max()) / math.sqrt(columns),
            column_bias=float(np.abs(self.column_sums).max()) / math.sqrt(rows),
            gain=abs(self.along) / length if length > 0 else 0.0,
            worst_row=int(np.argmax(row)),
        )
        return Screen(found, _slack(found, rows, columns, dtype))


def _slack(found: Statistics, rows: int, columns: int, dtype: str) -> dict[str, float]:
    """Return how far float32 may have carried each statistic.

    Rounding golden and observed to float32 moves an error by two units of the golden, which are
    ``2 * unit * 2 ** fraction_bits * sqrt(12)`` in units of the noise, since the spacing of the
    storage dtype is at least ``2 ** -fraction_bits`` of the power of two below the value. The other
    operations are relative to the error itself. A sum of n terms is off by ``gamma_n`` times the
    sum of their magnitudes (Higham, (3.5)), at most n times their root mean square.
    """
    moved = 2.0 * 2.0 * _UNIT * 2.0 ** _FRACTION_BITS[dtype] * math.sqrt(12.0)
    relative = _STEPS * _UNIT

    def gamma(n: int) -> float:
        return n * _UNIT / (1.0 - n * _UNIT)

    across, down = gamma(min(columns, CHUNK)), gamma(min(rows, max(1, BLOCK // columns)))

    def mean(value: float, n: int, lost: float) -> float:
        # sqrt(n) times a mean of n elements, each of them moved, in a sum that loses `lost`.
        return math.sqrt(n) * (moved + value * (relative + lost))

    size = rows * columns
    return {
        "rms": found.rms * (relative + across) + moved,
        "row": found.row * (relative + across) + moved,
        "column": found.column * (relative + down) + moved,
        "tail": found.tail * relative + moved,
        "row_bias": mean(found.row, columns, across),
        "column_bias": mean(found.column, rows, down),
        # The error moves by at most its own slack in every element, the golden's direction by
        # what is relative; and the length of the direction is only known as well as its sum.
        "gain": mean(found.rms, size, across) + 2.0 * (relative + across) * found.gain,
    }
