r"""Slow drift: many steps, each too small to see, in one direction.

A series is one metric of a cell, run by run since its anchor. As long as nothing changes, runs with
other inputs come in no particular order: they are exchangeable, whatever their distribution. Then
the rank of the newest value among all so far is uniform, and so is its conformal p-value

.. math:: p_t = \#\{j \le t : x_j \ge x_t\} / t

or larger where values are equal (Vovk, Nouretdinov and Gammerman 2003). Each is bet on with
:math:`f(p) = e\,p^{e-1}`, which averages 1 over a uniform p, and the bets are added up from every
possible beginning of a drift (Shiryaev and Roberts):

.. math:: R_t = f(p_t) (1 + R_{t-1}), \qquad R_0 = 0

Without drift :math:`R_t - t` has no trend, so that :math:`P(R \ge A \text{ within } n \text{ runs})
\le n / A` by optional stopping, for any n and any peeking. A cell has K series; each gets its share
of one false alarm in ``every`` runs, so that a healthy cell raises any alarm within n runs with
probability at most ``n / every``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVERY = 1000
"""Runs of a healthy cell in which at most one false alarm is expected."""
# Sharp bets gain most once there is a long history, blunt ones while it is short.
_EXPONENTS = (0.1, 0.25, 0.5)
# Drift that moves many taps a little shows in the means, drift of one tap in that tap alone: half
# of the false alarms are granted to each kind.
_SHARE = 0.5


@dataclass(frozen=True)
class Alarm:
    """A series that drifts.

    Attributes
    ----------
    series
        ``MODE TAP``, or ``MODE mean``.
    at
        Index of the first run that raises the alarm.
    evidence
        The largest :math:`R_t` over its threshold.
    first, last
        Mean of the first half of the values before the alarm, and the newest value.
    """

    series: str
    at: int
    evidence: float
    first: float
    last: float


def evidence(values: Sequence[float]) -> list[float]:
    """Return :math:`R_t` after every run, the mean over the bets; ``inf`` is the largest value."""
    seen: list[float] = []
    sums = [0.0] * len(_EXPONENTS)
    found = []
    for count, value in enumerate(values, start=1):
        insort(seen, value)
        p = (count - bisect_left(seen, value)) / count
        sums = [
            e * p ** (e - 1.0) * (1.0 + before) for e, before in zip(_EXPONENTS, sums, strict=True)
        ]
        found.append(sum(sums) / len(sums))
    return found


def thresholds(taps: int, means: int, every: int) -> tuple[float, float]:
    """Return what :math:`R_t` of one tap's series, and of one mean's, must reach."""
    return every * max(taps, 1) / _SHARE, every * max(means, 1) / _SHARE


def alarms(
    series: Mapping[tuple[str, str], Sequence[float]],
    every: int = EVERY,
    *,
    standing: bool = True,
) -> tuple[Alarm, ...]:
    """Return every alarm of a cell, the strongest first.

    Parameters
    ----------
    series
        By mode and tap: one positive value per run, oldest first; all of one length.
    every
        Runs in which at most one false alarm is expected.
    standing
        Only those that are in force after the last run: a drift that was put right fades.
    """
    means = mode_means(series)
    for_tap, for_mean = thresholds(len(series), len(means), every)
    every_series = [(f"{mode} {tap}", x, for_tap) for (mode, tap), x in series.items()]
    every_series += [(f"{mode} mean", x, for_mean) for mode, x in means.items()]
    found = []
    for name, values, threshold in every_series:
        reached = evidence(values)
        over = [at for at, r in enumerate(reached) if r >= threshold]
        if over and (reached[-1] >= threshold or not standing):
            half = values[: max(1, over[0] // 2)]
            first = sum(half) / len(half)
            found.append(Alarm(name, over[0], reached[-1] / threshold, first, values[-1]))
    return tuple(sorted(found, key=lambda alarm: -alarm.evidence))


def mode_means(series: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, list[float]]:
    """Return for each mode the geometric mean over its taps, run by run."""
    groups: dict[str, list[Sequence[float]]] = {}
    for (mode, _), values in series.items():
        groups.setdefault(mode, []).append(values)
    return {
        mode: [_geometric_mean(column) for column in zip(*group, strict=True)]
        for mode, group in groups.items()
    }


def _geometric_mean(values: Sequence[float]) -> float:
    if any(math.isinf(value) for value in values):
        return math.inf
    # An exact result is as good as it gets; it says nothing of the others' direction.
    positive = [math.log(value) for value in values if value > 0]
    return math.exp(sum(positive) / len(positive)) if positive else 0.0
