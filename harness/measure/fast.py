"""A first look at large error tensors: the seven statistics in float32, and their uncertainty.

What is proved to lie within its limits here needs no second look; only what comes close, or fails,
is worth the exact statistics in float64. One pass in tiles looks
at a subject's tensor and at the evaluation orders beside it.
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
    Share,
    Shares,
    Statistics,
)
from harness.measure.widening import widen

NARROW = ("float16", "bfloat16")
"""Storage dtypes whose rounding float32 can see."""
BLOCK = 1 << 17
"""Elements of a tile: smaller ones are lost to the interpreter, larger ones to the memory."""
WIDTH = 1 << 13
"""Columns of a tile; the more rows it has, the cheaper are sums over rows."""
CHUNK = 256
"""Terms that are summed in float32; the sums of chunks are summed in float64."""
_UNIT = 2.0**-24
"""Unit roundoff of float32."""
# Per element: the difference rounded twice, three operations for the noise, its root, a division
# and two products; the noise of two shares has four more, halved by the root. Each is within one
# unit roundoff of its operands.
_STEPS = 10
# The exponent field of a float32, sign and fraction masked away: the power of two below a value.
_EXPONENT = np.int32(0x7F800000)
# A share of a variance is two such variances by one another, and a mean of a row at most.
_SHARE = 1.0 - (3 * _STEPS + CHUNK) * _UNIT
# Squares from here on are far from the subnormal numbers of float32.
_CLEAR = np.float32(2.0**-100)


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

    def at_most(self) -> Statistics:
        """Return what no exact statistic exceeds."""
        return self._moved(1.0)

    def at_least(self) -> Statistics:
        """Return what every exact statistic reaches."""
        return self._moved(-1.0)

    def _moved(self, sign: float) -> Statistics:
        # Infinite means unknown, and unknown stays infinite.
        moved = {
            name: max(0.0, value + sign * self.slack[name]) if math.isfinite(value) else value
            for name, value in ((name, self.statistics.get(name)) for name in STATISTICS)
        }
        return Statistics(**moved, worst_row=self.statistics.worst_row)


@dataclass(frozen=True)
class Look:
    """A first look at several tensors with one golden.

    Attributes
    ----------
    screens
        One for each tensor.
    shares
        Of the expected variance, what is at least accumulation.
    relative
        Relative L2 error of each tensor; NaN where float32 cannot hold it.
    largest
        Largest magnitude of the golden, as float32 has it.
    """

    screens: tuple[Screen, ...]
    shares: Shares
    relative: tuple[float, ...]
    largest: float


def look(
    golden: NDArray[Any],
    tensors: Sequence[NDArray[Any]],
    dtype: str,
    shares: Sequence[Share] = (),
) -> Look:
    """Return the statistics of each tensor minus the golden, and their uncertainty.

    Parameters
    ----------
    golden
        ``(rows, columns)`` float64.
    tensors
        The same shape, any float dtype.
    dtype
        Storage dtype, whose rounding is the noise: one of `NARROW`. In float32 there would be
        nothing left to see the rounding of float32 with.
    shares
        What joins the variance of that rounding at each element.

    Raises
    ------
    ValueError
        If ``dtype`` is another one.
    """
    if dtype not in NARROW:
        raise ValueError(f"dtype: expected float16 or bfloat16, found {dtype!r}")
    rows, columns = golden.shape
    sums = [_Sums(rows, columns) for _ in tensors]
    ground = _Ground(rows, columns, shares, dtype)
    height = _height(columns)
    with np.errstate(invalid="ignore", over="ignore"):
        for left in range(0, columns, WIDTH):
            across = slice(left, min(left + WIDTH, columns))
            if left == 0 or across.stop == columns:
                work = _Work(height, across.stop - left)
            for at in range(0, rows, height):
                down = slice(at, min(at + height, rows))
                ground.prepare(down, across, golden[down, across], work)
                for tensor, total in zip(tensors, sums, strict=True):
                    work.load(tensor[down, across], golden[down, across])
                    total.add(down, across, work)
    return Look(
        tuple(total.finish(ground.length, ground.scale) for total in sums),
        ground.shares(),
        tuple(total.relative(ground.norm) for total in sums),
        ground.largest,
    )


def _height(columns: int) -> int:
    """Return the rows of a tile."""
    return max(1, min(CHUNK, BLOCK // min(columns, WIDTH)))


class _Work:
    """The buffers of one tile."""

    def __init__(self, height: int, columns: int) -> None:
        # Whole chunks: what lies beyond the columns stays zero, and adds nothing.
        shape = (height, -(-columns // CHUNK) * CHUNK)
        self.columns = columns
        self.inside = np.s_[:, :columns]
        self.error, self.plain, self.direction, self.weight, self.spare, self.power = (
            np.zeros(shape, np.float32) for _ in range(6)
        )
        # The golden as the sum of two numbers of float32.
        self.high, self.low = (np.zeros(shape, np.float32) for _ in range(2))

    def load(self, observed: NDArray[Any], golden: NDArray[Any]) -> None:
        """Fill ``plain`` with the error and ``error`` with the error over the noise."""
        n = len(golden)
        plain, error = self.plain[:n], self.error[:n]
        if observed.dtype.itemsize > 4:
            np.subtract(observed, golden, out=plain[self.inside], casting="same_kind")
        else:
            # Either the difference to the high part is exact (Sterbenz), or the low part is far
            # below its rounding: the error is relative to the result in both cases.
            widen(observed, plain[self.inside])
            plain -= self.high[:n]
            plain -= self.low[:n]
        np.multiply(plain, self.weight[:n], out=error)


class _Ground:
    """What all tensors share: the golden, its noise, and how much of that is accumulation."""

    def __init__(self, rows: int, columns: int, shares: Sequence[Share], dtype: str) -> None:
        self.rows, self.columns = rows, columns
        # The rounding is a power of two over this. It is applied to the sums: before, it would take
        # the least noise of bfloat16 out of the range of float32.
        self.scale = 2.0 ** _FRACTION_BITS[dtype] * math.sqrt(12.0)
        self.least = np.float32(2.0 ** _MIN_EXPONENT[dtype]).view(np.int32)
        self.joined = [
            ((row * self.scale**2).astype(np.float32), column.astype(np.float32))
            for row, column in shares
        ]
        self.length = self.norm = self.largest = 0.0
        self.element, self.by_row, self.by_column = 0.0, np.zeros(rows), np.zeros(columns)

    def prepare(self, down: slice, across: slice, golden: NDArray[Any], work: _Work) -> None:
        """Fill ``direction`` with the golden over the noise and ``weight`` with one over it."""
        n, inside = len(golden), work.inside
        high, low, truth, weight, spare, power = (
            buffer[:n]
            for buffer in (
                work.high, work.low, work.direction, work.weight, work.spare, work.power
            )
        )  # fmt: skip
        np.copyto(high[inside], golden, casting="same_kind")
        np.subtract(golden, high[inside], out=low[inside], casting="same_kind")
        self.largest = max(self.largest, float(high.max()), -float(high.min()))
        self.norm += float(np.vdot(high, high))
        np.bitwise_and(high.view(np.int32), _EXPONENT, out=power.view(np.int32))
        # Positive floats are ordered as their bits are, and integers need no look at NaN.
        np.maximum(power.view(np.int32), self.least, out=power.view(np.int32))
        if self.joined:
            np.multiply(power, power, out=weight)
            spare[...] = 0.0
            for row, column in self.joined:
                spare[inside] += row[down, None] * column[across]
            weight += spare
            self._count(down, across, spare, weight)
            np.sqrt(weight, out=weight)
            # The square of a small power is zero.
            np.maximum(weight, power, out=power)
        np.divide(np.float32(1.0), power, out=weight)
        np.multiply(high, weight, out=truth)
        np.multiply(truth, truth, out=spare)
        self.length += float(_by_row(spare).sum())

    def _count(
        self,
        down: slice,
        across: slice,
        extra: NDArray[np.float32],
        variance: NDArray[np.float32],
    ) -> None:
        # Where squares lose digits, a share is less than it is.
        extra /= np.maximum(variance, _CLEAR)
        self.element = max(self.element, float(extra.max()))
        self.by_row[down] += _by_row(extra)
        self.by_column[across] += _by_column(extra)[: across.stop - across.start]

    def shares(self) -> Shares:
        """Return shares that the exact ones reach."""
        return Shares(
            element=self.element * _SHARE,
            row=float(self.by_row.max()) / self.columns * _SHARE,
            column=float(self.by_column.max()) / self.rows * _SHARE,
            total=float(self.by_row.sum()) / (self.rows * self.columns) * _SHARE,
        )


_ONES = np.ones(CHUNK, np.float32)


def _by_row(values: NDArray[np.float32]) -> Float:
    """Return the sum of each row, chunk by chunk in float32 and in float64 beyond."""
    chunks = (values.reshape(-1, CHUNK) @ _ONES).reshape(len(values), -1)
    result: Float = chunks.sum(axis=1, dtype=np.float64)
    return result


def _by_column(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sum of each column of a tile."""
    # A product with one row is far slower than none.
    return values[0] if len(values) == 1 else np.ones(len(values), np.float32) @ values


class _Sums:
    """Sums over rows, columns and everything."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row_squares, self.row_sums = np.zeros(rows), np.zeros(rows)
        self.column_squares, self.column_sums = np.zeros(columns), np.zeros(columns)
        self.tail, self.along, self.plain, self.bad = 0.0, 0.0, 0.0, rows

    def add(self, down: slice, across: slice, work: _Work) -> None:
        n, width = down.stop - down.start, across.stop - across.start
        error, truth, squares = work.error[:n], work.direction[:n], work.spare[:n]
        high, low = float(error.max()), float(error.min())
        if not math.isfinite(high + abs(low)):
            first = down.start + int(np.argmax(~np.isfinite(error).all(axis=1)))
            self.bad = min(self.bad, first)
        self.tail = max(self.tail, high, -low)
        self.row_sums[down] += _by_row(error)
        self.column_sums[across] += _by_column(error)[:width]
        np.multiply(error, error, out=squares)
        self.row_squares[down] += _by_row(squares)
        self.column_squares[across] += _by_column(squares)[:width]
        np.multiply(error, truth, out=squares)
        self.along += float(_by_row(squares).sum())
        plain = work.plain[:n]
        self.plain += float(np.vdot(plain, plain))

    def relative(self, norm: float) -> float:
        """Return the relative L2 error, given the golden's sum of squares."""
        if not (math.isfinite(self.plain) and math.isfinite(norm) and self.plain >= 0.0 < norm):
            return math.nan
        return math.sqrt(self.plain / norm)

    def finish(self, length: float, scale: float) -> Screen:
        rows, columns = self.rows, self.columns
        if self.bad < rows or not math.isfinite(float(self.row_squares.sum()) + length):
            # Not finite, or beyond float32: nothing is known but that it is not small.
            worst = self.bad if self.bad < rows else int(np.argmax(self.row_squares))
            infinite = Statistics(*(math.inf,) * 7, worst_row=worst)
            return Screen(infinite, dict.fromkeys(STATISTICS, math.inf))
        size = rows * columns
        row = scale * np.sqrt(self.row_squares / columns)
        length = math.sqrt(length)
        found = Statistics(
            rms=scale * math.sqrt(float(self.row_squares.sum()) / size),
            row=float(row.max()),
            column=scale * math.sqrt(float(self.column_squares.max()) / rows),
            tail=scale * self.tail,
            row_bias=scale * float(np.abs(self.row_sums).max()) / math.sqrt(columns),
            column_bias=scale * float(np.abs(self.column_sums).max()) / math.sqrt(rows),
            gain=scale * abs(self.along) / length if length > 0 else 0.0,
            worst_row=int(np.argmax(row)),
        )
        return Screen(found, _slack(found, rows, columns, scale))


def _slack(found: Statistics, rows: int, columns: int, scale: float) -> dict[str, float]:
    """Return how far float32 may have carried each statistic.

    An error is a difference to a golden of two parts; all that follows is relative to it. The low
    part is itself rounded, by no more than the square of the unit roundoff times the golden. A sum
    of n terms is off by ``gamma_n`` times the sum of their magnitudes (Higham, (3.5)), at most n
    times their root mean square.
    """
    relative = _STEPS * _UNIT
    # In noise units: the golden is below two powers of two, the spacing above 2 ** -fraction_bits
    # of one. No error at all is no error.
    moved = 2.0 * _UNIT**2 * scale if found.tail > 0 else 0.0

    def gamma(n: int) -> float:
        return n * _UNIT / (1.0 - n * _UNIT)

    across, down = gamma(min(columns, CHUNK)), gamma(min(rows, _height(columns)))

    def mean(value: float, n: int, lost: float) -> float:
        # sqrt(n) times a mean of n elements, in a sum that loses `lost`.
        return math.sqrt(n) * (moved + value * (relative + lost))

    return {
        "rms": found.rms * (relative + across) + moved,
        "row": found.row * (relative + across) + moved,
        "column": found.column * (relative + down) + moved,
        "tail": found.tail * relative + moved,
        "row_bias": mean(found.row, columns, across),
        "column_bias": mean(found.column, rows, down),
        # The length of the golden's direction is only known as well as its sum.
        "gain": mean(found.rms, rows * columns, across) + 2.0 * (relative + across) * found.gain,
    }
