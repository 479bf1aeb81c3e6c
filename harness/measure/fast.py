"""A first look at large error tensors: the seven statistics in float32, and their uncertainty.

What is proved to lie within its limits here needs no second look; only what comes close, or fails,
is worth the exact statistics in float64. One pass in blocks that stay in the processor's cache
looks at a subject's tensor and at the evaluation orders beside it.
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

NARROW = ("float16", "bfloat16")
"""Storage dtypes whose rounding float32 can see."""
BLOCK = 1 << 15
"""Elements of a block: eight buffers of float32 in a megabyte."""
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
    height = max(1, BLOCK // columns)
    work = _Work(height, columns)
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, rows, height):
            part = slice(at, min(at + height, rows))
            ground.prepare(part, golden[part], work)
            for tensor, total in zip(tensors, sums, strict=True):
                work.load(tensor[part], golden[part])
                total.add(part, work, part.stop - part.start)
    return Look(
        tuple(total.finish(ground.length, ground.scale) for total in sums),
        ground.shares(),
        tuple(total.relative(ground.norm) for total in sums),
        ground.largest,
    )


class _Work:
    """The buffers of one block."""

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
            np.copyto(plain[self.inside], observed, casting="same_kind")
            plain -= self.high[:n]
            plain -= self.low[:n]
        np.multiply(plain, self.weight[:n], out=error)


class _Ground:
    """What all tensors share: the golden, its noise, and how much of that is accumulation."""

    def __init__(self, rows: int, columns: int, shares: Sequence[Share], dtype: str) -> None:
        self.columns, self.size = columns, rows * columns
        # The rounding is a power of two over this. It is applied to the sums: before, it would take
        # the least noise of bfloat16 out of the range of float32.
        self.scale = 2.0 ** _FRACTION_BITS[dtype] * math.sqrt(12.0)
        self.least = np.float32(2.0 ** _MIN_EXPONENT[dtype])
        self.joined = [
            ((row * self.scale**2).astype(np.float32), column.astype(np.float32))
            for row, column in shares
        ]
        self.length = self.norm = self.largest = 0.0
        self.element, self.row, self.column = 0.0, 0.0, np.zeros(columns)
        self.total = 0.0

    def prepare(self, part: slice, golden: NDArray[Any], work: _Work) -> None:
        """Fill ``direction`` with the golden over the noise and ``weight`` with one over it."""
        n, inside = len(golden), work.inside
        truth, weight, spare, power = (
            buffer[:n] for buffer in (work.direction, work.weight, work.spare, work.power)
        )
        np.copyto(work.high[:n][inside], golden, casting="same_kind")
        np.subtract(golden, work.high[:n][inside], out=work.low[:n][inside], casting="same_kind")
        np.copyto(truth, work.high[:n])
        self.largest = max(self.largest, float(truth.max()), -float(truth.min()))
        self.norm += float(np.vdot(truth, truth))
        np.bitwise_and(truth.view(np.int32), _EXPONENT, out=power.view(np.int32))
        np.maximum(power, self.least, out=power)
        np.copyto(weight, power)
        if self.joined:
            np.multiply(power, power, out=weight)
            spare[...] = 0.0
            for row, column in self.joined:
                spare[inside] += row[part, None] * column
            weight += spare
            self._count(spare, weight)
            np.sqrt(weight, out=weight)
            # The square of a small power is zero.
            np.maximum(weight, power, out=weight)
        np.divide(np.float32(1.0), weight, out=weight)
        truth *= weight
        self.length += _square(truth)

    def _count(self, extra: NDArray[np.float32], variance: NDArray[np.float32]) -> None:
        # Where squares lose digits, a share is less than it is.
        extra /= np.maximum(variance, _CLEAR)
        self.element = max(self.element, float(extra.max()))
        across = extra.sum(axis=1, dtype=np.float64)
        self.row = max(self.row, float(across.max()) / self.columns)
        self.total += float(across.sum())
        self.column += extra.sum(axis=0, dtype=np.float64)[: self.columns]

    def shares(self) -> Shares:
        """Return shares that the exact ones reach."""
        rows = self.size // self.columns
        return Shares(
            element=self.element * _SHARE,
            row=self.row * _SHARE,
            column=float(self.column.max()) / rows * _SHARE,
            total=self.total / self.size * _SHARE,
        )


def _square(block: NDArray[np.float32]) -> float:
    """Return the sum of squares, chunk by chunk in float32 and in float64 beyond."""
    chunks = block.reshape(-1, CHUNK)
    return float(np.einsum("ij,ij->i", chunks, chunks).sum(dtype=np.float64))


class _Sums:
    """Sums over rows, columns and everything."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row_squares, self.row_sums = np.empty(rows), np.empty(rows)
        self.column_squares, self.column_sums = np.zeros(columns), np.zeros(columns)
        self.tail, self.along, self.plain, self.bad = 0.0, 0.0, 0.0, -1
        self._ones = np.ones(CHUNK, np.float32)

    def _by_row(self, values: NDArray[np.float32]) -> Float:
        chunks = (values.reshape(-1, CHUNK) @ self._ones).reshape(len(values), -1)
        result: Float = chunks.sum(axis=1, dtype=np.float64)
        return result

    def add(self, part: slice, work: _Work, n: int) -> None:
        error, truth, squares = work.error[:n], work.direction[:n], work.spare[:n]
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
        plain = work.plain[:n]
        self.plain += float(np.vdot(plain, plain))

    def relative(self, norm: float) -> float:
        """Return the relative L2 error, given the golden's sum of squares."""
        if not (math.isfinite(self.plain) and math.isfinite(norm) and self.plain >= 0.0 < norm):
            return math.nan
        return math.sqrt(self.plain / norm)

    def finish(self, length: float, scale: float) -> Screen:
        rows, columns = self.rows, self.columns
        if self.bad >= 0 or not math.isfinite(float(self.row_squares.sum()) + length):
            # Not finite, or beyond float32: nothing is known but that it is not small.
            worst = self.bad if self.bad >= 0 else int(np.argmax(self.row_squares))
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

    across, down = gamma(min(columns, CHUNK)), gamma(min(rows, max(1, BLOCK // columns)))

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
