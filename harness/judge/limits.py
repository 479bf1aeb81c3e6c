"""From the legitimate evaluation orders to a limit for each statistic."""

from __future__ import annotations

import math
from statistics import NormalDist

from harness.judge.factors import Factors
from harness.measure.records import Measurement
from harness.measure.statistics import STATISTICS, Shares, Statistics

_NORMAL = NormalDist()
# A correctly rounded element is off by at most half a spacing; noise is a spacing over sqrt(12).
_HALF_SPACING = math.sqrt(3.0)
# The square of a uniform error has mean 1 and variance 4/5 in noise units, so the root mean square
# of n of them has a standard deviation of sqrt(4/5) / 2 / sqrt(n).
_RMS_SPREAD = math.sqrt(0.8) / 2.0
_ROUNDING_ALONE = Shares()


def _quantile(count: int, alpha: float) -> float:
    """Return what ``count`` standard normal values exceed in magnitude with probability alpha."""
    return -_NORMAL.inv_cdf(alpha / (2.0 * count))


def _normal_square(averaged: int, quantile: float) -> float:
    """Return the quantile of a mean of squared normal values (Wilson and Hilferty 1931)."""
    step = 2.0 / (9.0 * averaged)
    return (1.0 - step + quantile * math.sqrt(step)) ** 3


def floor(
    statistic: str, rows: int, columns: int, alpha: float, shares: Shares = _ROUNDING_ALONE
) -> float:
    """Return what independent errors of the expected size reach by chance alone.

    The orders are few and round alike, so that on a small tensor the worst of them may lie below
    what another correct implementation shows. What is rounding is bounded by half a spacing; what
    is accumulation is taken as normal.

    Parameters
    ----------
    statistic
        One of ``STATISTICS``.
    rows, columns
        Shape of the error matrix.
    alpha
        Probability of exceeding the floor.
    shares
        Of the expected variance, what is accumulation.
    """
    if statistic == "tail":
        quantile = _quantile(rows * columns, alpha)
        # sqrt(3) * sqrt(1 - s) + q * sqrt(s) is largest at s = q^2 / (3 + q^2).
        share = min(shares.element, quantile**2 / (3.0 + quantile**2))
        return _HALF_SPACING * math.sqrt(1.0 - share) + quantile * math.sqrt(share)
    if statistic in ("rms", "row", "column"):
        averaged, count, share = {
            "rms": (rows * columns, 1, shares.total),
            "row": (columns, rows, shares.row),
            "column": (rows, columns, shares.column),
        }[statistic]
        quantile = _quantile(count, alpha)
        spread = quantile * _RMS_SPREAD / math.sqrt(averaged)
        rounding = min(_HALF_SPACING, 1.0 + spread)
        accumulation = _normal_square(averaged, quantile)
        return math.sqrt((1.0 - share) * rounding**2 + share * accumulation)
    count, averaged, share = {
        "row_bias": (rows, columns, shares.row),
        "column_bias": (columns, rows, shares.column),
        "gain": (1, rows * columns, shares.total),
    }[statistic]
    quantile = _quantile(count, alpha)
    # A mean of n errors, scaled by sqrt(n), cannot exceed sqrt(n) times the largest error.
    bounded = _HALF_SPACING * math.sqrt(averaged * (1.0 - share)) + quantile * math.sqrt(share)
    return min(quantile, bounded)


def scarcity(measurement: Measurement, alpha: float) -> float:
    """Return how much further a fresh draw may lie where the envelope rests on few draws.

    A chained error is one random draw a row: what came before rotates all of it at once. The worst
    of n draws of a uniform variable is exceeded c-fold by another one with probability
    ``c ** -n / (n + 1)``, hence ``c = ((n + 1) * alpha) ** (-1 / n)``: 11 for one row and five
    orders, 1.1 for twenty rows. Local errors are roundings, whose size is known without draws.

    Parameters
    ----------
    measurement
        The tap as measured.
    alpha
        Probability of exceeding the limit by chance.
    """
    draws = len(usable(measurement.orders)) * measurement.rows
    if measurement.mode == "local" or draws == 0:
        return 1.0
    return float(max(1.0, ((draws + 1) * alpha) ** (-1.0 / draws)))


def base(measurement: Measurement, statistic: str, alpha: float) -> float:
    """Return a limit before its safety factor: the worst order or the floor, few draws allowed for.

    NaN if no order stayed finite: then nothing can be judged.
    """
    worst = max((order.get(statistic) for order in usable(measurement.orders)), default=math.nan)
    rows, columns = measurement.rows, measurement.columns
    least = floor(statistic, rows, columns, alpha, measurement.shares)
    return scarcity(measurement, alpha) * max(worst, least)


def usable(orders: tuple[Statistics, ...]) -> tuple[Statistics, ...]:
    """Return the orders that stayed finite; one that overflows makes no limit."""
    return tuple(order for order in orders if math.isfinite(order.rms))


def limits(measurement: Measurement, dtype: str, factors: Factors) -> dict[str, float]:
    """Return the limit of each statistic; all zero where every correct result is exact.

    Parameters
    ----------
    measurement
        The tap as measured.
    dtype
        Storage dtype.
    factors
        Calibrated safety factors.
    """
    if measurement.exact:
        return dict.fromkeys(STATISTICS, 0.0)
    return {
        name: factors.get(measurement.mode, dtype, name) * base(measurement, name, factors.alpha)
        for name in STATISTICS
    }
