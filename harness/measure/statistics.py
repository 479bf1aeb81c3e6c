"""Statistics of a tensor's error, in units of the rounding noise that is expected of each element.

An error is divided, element by element, by the noise a correct implementation would show there: the
rounding of the storage dtype at that magnitude, joined with what accumulation adds in that row.
Seven statistics then look at the result from different sides, so that a slow bias, a single wrong
row and a single wrong element each have one that sees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

Share = tuple[Float, Float]
"""A variance as the product of a row's ``(rows,)`` and a column's ``(columns,)`` share."""

_EXPONENT = np.int64(0x7FF0_0000_0000_0000)
_FRACTION_BITS = {"float16": 10, "bfloat16": 7, "float32": 23}
_MIN_EXPONENT = {"float16": -14, "bfloat16": -126, "float32": -126}
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

STATISTICS: tuple[str, ...] = (
    "rms",
    "row",
    "column",
    "tail",
    "row_bias",
    "column_bias",
    "gain",
)


def ulp(values: Float, dtype: str) -> Float:
    """Return the spacing of ``dtype`` at each magnitude; zero and subnormals share the least.

    Parameters
    ----------
    values
        Any shape, finite.
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    """
    # The exponent field alone is the power of two below a value, and zero for zero.
    magnitude = np.ascontiguousarray(values, np.float64).view(np.int64) & _EXPONENT
    leading = np.maximum(magnitude.view(np.float64), 2.0 ** _MIN_EXPONENT[dtype])
    spacing: Float = leading * 2.0 ** -_FRACTION_BITS[dtype]
    return spacing


# How many rows (columns) of prior evidence a column's (row's) own noise has to outweigh. With one
# row there is nothing to tell a noisy column from a chance error, so the grand mean must dominate.
_PRIOR = 8.0


# Elements that are looked at together: a few arrays of float64 in the processor's cache.
_BLOCK = 1 << 14

# The method ``sum`` spends as long on its options as on a small array.
_reduce = np.add.reduce


def _spread(golden: Float, values: Sequence[Any], dtype: str, *, rounded: bool) -> Share | None:
    """Return the mean square error of evaluations as a row's times a column's share.

    Parameters
    ----------
    values
        Evaluations ``(rows, columns)`` of any float dtype; non-finite elements count as right.
    rounded
        They were rounded to storage: what half a spacing explains is not counted as error.
        Otherwise means are over the elements that have an error at all: values that are clipped
        have none but that of float32 itself, and say nothing of those that are sums.
    """
    rows, columns = golden.shape
    by_row, in_row = np.zeros(rows), np.zeros(rows)
    by_column, in_column = np.zeros(columns), np.zeros(columns)
    height = max(1, _BLOCK // columns)
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, rows, height):
            part = slice(at, at + height)
            truth = golden[part]
            allowed = 0.5 * ulp(truth, dtype) if rounded else None
            squares = _mean_square(truth, [value[part] for value in values], allowed)
            by_row[part], by_column = _reduce(squares, axis=1), by_column + _reduce(squares, axis=0)
            if rounded:
                in_row[part], in_column = truth.shape[1], in_column + truth.shape[0]
                continue
            counted = squares > (2.0**-24 * truth) ** 2
            in_row[part], in_column = counted.sum(axis=1), in_column + counted.sum(axis=0)
    total = in_row.sum()
    if total == 0 or not by_row.any():
        return None
    mean = by_row.sum() / total
    return (
        (by_row + _PRIOR * mean) / (in_row + _PRIOR),
        (by_column + _PRIOR * mean) / (in_column + _PRIOR) / mean,
    )


def _mean_square(truth: Float, values: Sequence[Any], allowed: Float | None) -> Float:
    """Return the mean square of what errors have beyond what is allowed; a non-finite one is 0."""
    squares = np.zeros_like(truth)
    for value in values:
        beyond = np.subtract(value, truth, dtype=np.float64)
        if allowed is not None:
            np.abs(beyond, out=beyond)
            beyond -= allowed
            np.maximum(beyond, 0.0, out=beyond)
        np.multiply(beyond, beyond, out=beyond)
        # A sum of squares is finite if all of them are: one pass less than to look at each.
        if not np.isfinite(beyond.sum()):
            beyond[~np.isfinite(beyond)] = 0.0
        squares += beyond
    squares /= len(values)
    return squares


def accumulation(
    golden: Float, orders: Sequence[Any], dtype: str, unrounded: Sequence[Any] = ()
) -> tuple[Share, ...]:
    """Return the variances that join the rounding of storage; see `noise_scale`."""
    found = [
        _spread(golden, values, dtype, rounded=rounded)
        for values, rounded in ((orders, True), (unrounded, False))
        if values
    ]
    return tuple(share for share in found if share is not None)


def noise_scale(
    golden: Float, orders: Sequence[Float], dtype: str, unrounded: Sequence[Float] = ()
) -> Float:
    """Return the standard deviation a correct implementation's error has at each element.

    Rounding to nearest is uniform over one spacing, hence spacing / sqrt(12). Two sources of noise
    join it, each estimated as a product of a row and a column share, since token positions and
    features differ in scale by orders of magnitude: what exceeds half a spacing in the legitimate
    orders, which the last rounding cannot have done, and the whole error of evaluations without
    that rounding, which shows the noise of accumulation even where a spacing hides it.

    Parameters
    ----------
    golden
        ``(rows, columns)`` float64.
    orders
        Results of the evaluation orders, same shape; non-finite elements are left out.
    dtype
        Storage dtype.
    unrounded
        Results of evaluations in float32 without rounding to storage, same shape.
    """
    variance = ulp(golden, dtype) ** 2 / 12.0
    for row, column in accumulation(golden, orders, dtype, unrounded):
        variance += row[:, None] * column
    scale: Float = np.sqrt(variance)
    return scale


@dataclass(frozen=True)
class Shares:
    """How much of the expected variance is not rounding to storage but accumulation: 0 to 1.

    The error of one rounding is bounded; a sum of many is nearly normal and is not.

    Attributes
    ----------
    element
        Largest share of one element; near a golden of zero the spacing vanishes, and it is 1.
    row, column
        Largest mean share of a row and of a column.
    total
        Mean share of all.
    """

    element: float = 0.0
    row: float = 0.0
    column: float = 0.0
    total: float = 0.0


def shares(golden: Float, noise: Float, dtype: str) -> Shares:
    """Return the shares of accumulation in a noise scale.

    Parameters
    ----------
    golden, noise
        ``(rows, columns)`` float64; ``noise`` as ``noise_scale`` has it.
    dtype
        Storage dtype.
    """
    share = np.clip(1.0 - (ulp(golden, dtype) / noise) ** 2 / 12.0, 0.0, 1.0)
    return Shares(
        element=float(share.max()),
        row=float(share.mean(axis=1).max()),
        column=float(share.mean(axis=0).max()),
        total=float(share.mean()),
    )


def row_noise(golden: Float, orders: Sequence[Float]) -> Float:
    """Return a noise scale that is one number a row, from the orders alone.

    For quantities that are not stored in the storage dtype themselves, such as an ALiBi bias that
    was measured through an attention kernel.
    """
    total = np.mean([np.square(result - golden) for result in orders], axis=0)
    per_row = np.sqrt(total.mean(axis=1, keepdims=True))
    floor = np.finfo(np.float64).eps * np.maximum(np.abs(golden), 1.0)
    scale: Float = np.maximum(per_row, floor)
    return scale


@dataclass(frozen=True)
class Statistics:
    """Seven views of one error tensor, all in units of expected noise.

    Attributes
    ----------
    rms
        Root mean square over everything.
    row, column
        Largest root mean square of one row (a token position) and of one column (a feature).
    tail
        Largest single element.
    row_bias, column_bias
        Largest mean of a row or column, times the square root of its length: 1 for independent
        errors, growing where errors share a sign.
    gain
        Projection of the error on the golden direction: a wrong scale.
    worst_row
        Row of the largest row statistic.
    """

    rms: float
    row: float
    column: float
    tail: float
    row_bias: float
    column_bias: float
    gain: float
    worst_row: int

    def get(self, name: str) -> float:
        """Return a statistic by its name in ``STATISTICS``."""
        value = getattr(self, name)
        return float(value)


AT_LEAST = Statistics(*(0.0,) * 7, worst_row=0)
"""What is known of an evaluation that was not measured."""


@dataclass(frozen=True)
class Ruler:
    """A golden and its noise, ready to measure several errors with.

    Attributes
    ----------
    noise
        ``(rows, columns)`` float64, positive.
    direction
        The golden in units of the noise.
    length
        Its L2 norm.
    """

    noise: Float
    direction: Float
    length: float

    @classmethod
    def of(cls, golden: Float, noise: Float) -> Ruler:
        """Return the ruler of a golden ``(rows, columns)`` and its noise."""
        direction: Float = golden / noise
        return cls(noise, direction, math.sqrt(float(np.einsum("ij,ij->", direction, direction))))

    def measure(self, one: Float, other: Float) -> Statistics:
        """Return the statistics of ``one - other``; a non-finite error makes them infinite."""
        rows, columns = one.shape
        with np.errstate(invalid="ignore", over="ignore"):
            error = one - other
            scaled = error / self.noise
            squares = scaled * scaled
            by_row = _reduce(squares, axis=1)
            total = float(by_row.sum())
            if not math.isfinite(total):
                bad = ~np.isfinite(error)
                if bad.any():
                    worst = int(np.argmax(bad.any(axis=1)))
                    return Statistics(*(math.inf,) * 7, worst_row=worst)
            gain = abs(float(np.einsum("ij,ij->", scaled, self.direction)))
        row_sums, column_sums = _reduce(scaled, axis=1), _reduce(scaled, axis=0)
        worst = int(np.argmax(by_row))
        return Statistics(
            rms=math.sqrt(total / (rows * columns)),
            row=math.sqrt(float(by_row[worst]) / columns),
            column=math.sqrt(float(_reduce(squares, axis=0).max()) / rows),
            tail=math.sqrt(float(squares.max())),
            row_bias=float(np.abs(row_sums).max()) / math.sqrt(columns),
            column_bias=float(np.abs(column_sums).max()) / math.sqrt(rows),
            gain=gain / self.length if self.length > 0 else 0.0,
            worst_row=worst,
        )


def statistics(observed: Float, golden: Float, noise: Float) -> Statistics:
    """Return the statistics of ``observed - golden``; a non-finite error makes them infinite.

    Parameters
    ----------
    observed, golden, noise
        ``(rows, columns)`` float64; ``noise`` is positive.
    """
    return Ruler.of(golden, noise).measure(observed, golden)


def relative_error(observed: Float, golden: Float) -> float:
    """Return the relative L2 error, the figure people quote; infinite if not finite."""
    with np.errstate(invalid="ignore"):
        error = observed - golden
    if not np.isfinite(error).all():
        return float("inf")
    size = float(np.sqrt(np.square(error).sum()))
    norm = float(np.sqrt(np.square(golden).sum()))
    return size / norm if norm > 0 else size
