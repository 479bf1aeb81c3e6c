"""Runs against a pinned anchor and against a rolling baseline.

What is compared is each tap's error over its limit. A limit is the worst legitimate evaluation
order times a factor, and the factor is how much further healthy implementations were measured to
lie. By as much an error may grow here, too. A growth that ends below the worst legitimate order
(the limit without its factor) is none: there, values differ by chance alone. Both are calibrated,
and stricter than the verdict wherever the run that one is held against lies inside its own limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.judge.factors import Factors
from harness.ledger.records import OF_LIMIT, Value

Key = tuple[str, str]


@dataclass(frozen=True)
class Growth:
    """The tap that grew most of what is allowed; all as parts of the tap's limit."""

    tap: str
    mode: str
    before: float
    now: float
    allowed: float

    @property
    def of_allowed(self) -> float:
        """Above 1 it grew too much."""
        return self.now / self.allowed


def of_limit(values: Sequence[Value]) -> dict[Key, Value]:
    """Return error over limit by mode and tap."""
    return {(v.mode, v.tap): v for v in values if v.metric == OF_LIMIT}


def growth(
    now: Mapping[Key, Value], before: Mapping[Key, float], dtype: str, factors: Factors
) -> Growth | None:
    """Return the tap that grew most of what is allowed; ``None`` if nothing can be compared.

    A value that is not finite is left to the verdict.
    """
    found = []
    for key, value in now.items():
        old = before.get(key)
        if old is None or value.value is None:
            continue
        factor = factors.get(value.mode, dtype, value.statistic)
        allowed = max(old * factor, 1.0 / factor)
        found.append(Growth(value.tap, value.mode, old, value.value, allowed))
    return max(found, key=lambda one: one.of_allowed, default=None)


def single(values: Mapping[Key, Value]) -> dict[Key, float]:
    """Return a run as a baseline."""
    return {key: value.value for key, value in values.items() if value.value is not None}


def rolling(runs: Sequence[Mapping[Key, Value]]) -> dict[Key, float]:
    """Return the median of several runs, tap by tap."""
    found: dict[Key, list[float]] = {}
    for run in runs:
        for key, value in run.items():
            if value.value is not None:
                found.setdefault(key, []).append(value.value)
    return {key: median(values) for key, values in found.items()}
