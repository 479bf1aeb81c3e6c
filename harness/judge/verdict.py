"""From measurements to judged rows and one verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.judge.coverage import Axis
from harness.judge.factors import Factors
from harness.judge.limits import limits, usable
from harness.measure.records import Failure, Measurement

Outcome = Literal["conforms", "diverges", "not-proven"]


@dataclass(frozen=True)
class Row:
    """One measurement with its verdict.

    Attributes
    ----------
    measurement
        What was measured.
    statistic
        The statistic closest to, or furthest beyond, its limit.
    observed, limit
        That statistic's value and limit, in units of the expected rounding noise.
    ratio
        ``observed / limit``; above 1 the tap diverges.
    note
        A finding beside the number, such as an overflow of the storage dtype; may be empty.
    """

    measurement: Measurement
    statistic: str
    observed: float
    limit: float
    ratio: float
    note: str = ""

    @property
    def diverges(self) -> bool:
        """Whether the limit is exceeded; a NaN exceeds every limit."""
        return not self.ratio <= 1.0


def judge(measurement: Measurement, dtype: str, factors: Factors) -> Row:
    """Judge one measurement by its worst statistic.

    Parameters
    ----------
    measurement
        The tap as measured.
    dtype
        Storage dtype.
    factors
        Calibrated safety factors.
    """
    if not measurement.exact and not usable(measurement.orders):
        note = f"every legitimate order overflows {dtype} here"
        return Row(measurement, "rms", measurement.observed.rms, math.nan, math.inf, note)
    bounds = limits(measurement, dtype, factors)
    worst = ("rms", 0.0, 0.0, -1.0)
    for name, limit in bounds.items():
        value = measurement.observed.get(name)
        ratio = value / limit if limit > 0 else (0.0 if value == 0 else math.inf)
        # A NaN compares with nothing: as infinity, no later statistic can take its place.
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > worst[3]:
            worst = (name, value, limit, ratio)
    note = ""
    if measurement.overflow:
        note = f"{measurement.overflow} golden values exceed the range of {dtype}"
    return Row(measurement, worst[0], worst[1], worst[2], worst[3], note)


def is_golden_itself(rows: Sequence[Row]) -> bool:
    """Return whether a subject shows no rounding error where every implementation must.

    Whoever returns the golden was not measured: it is the comparison of a thing with itself.
    """
    rounding = [
        row.measurement
        for row in rows
        if row.measurement.mode in ("local", "free-running", "deployed")
        and not row.measurement.exact
        and row.measurement.place.tap != "forward-chain"
        and any(order.rms > 0 for order in row.measurement.orders)
    ]
    return bool(rounding) and all(m.observed.rms == 0 for m in rounding)


def outcome(
    rows: Sequence[Row], failures: Sequence[Failure], broken: int, axes: Iterable[Axis]
) -> Outcome:
    """Return the verdict: a divergence outweighs a gap, and a gap is never green.

    Parameters
    ----------
    rows
        Every judged row.
    failures
        Calls into the subject that failed.
    broken
        Number of tensors that did not arrive.
    axes
        What was expected and what was compared.
    """
    if failures or broken or any(row.diverges for row in rows):
        return "diverges"
    if not rows or not all(axis.complete for axis in axes):
        return "not-proven"
    return "conforms"
