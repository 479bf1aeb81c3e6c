"""From judged rows to the record of a check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from harness.diagnose.inquiry import Diagnosis
from harness.judge.coverage import Axis
from harness.judge.verdict import Row
from harness.localise import Divergence
from harness.measure.arrival import Arrival
from harness.measure.records import Conversion, Failure, LogitSummary
from harness.measure.taps import Place
from harness.report.record import (
    AxisRecord,
    ConversionRecord,
    DiagnosisRecord,
    DivergenceRecord,
    FailureRecord,
    LogitRecord,
    SkipRecord,
    TapRecord,
    TensorRecord,
)


def axes_record(axes: Iterable[Axis]) -> dict[str, AxisRecord]:
    """Return the axes by name."""
    return {
        axis.name: AxisRecord(
            axis.expected,
            axis.compared,
            tuple(SkipRecord(o.count, o.reason) for o in axis.skipped),
        )
        for axis in axes
    }


def divergence_record(found: Divergence | None) -> DivergenceRecord | None:
    """Return the first divergence as plain data."""
    if found is None:
        return None
    reason = found.reason
    if not reason and found.observed is not None and not math.isfinite(found.observed):
        reason = "the subject's values are not finite"
    return DivergenceRecord(**{**asdict(found), "reason": reason})


def diagnosis_record(found: Diagnosis | None) -> DiagnosisRecord | None:
    """Return a diagnosis as plain data."""
    return None if found is None else DiagnosisRecord(**asdict(found))


def tap_records(rows: Sequence[Row], order: Sequence[Place]) -> tuple[TapRecord, ...]:
    """Return one record per tap and mode, the worst case of each, in order of evaluation."""
    position = {place: index for index, place in enumerate(order)}
    grouped: dict[tuple[Place, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.measurement.place, row.measurement.mode), []).append(row)

    def severity(row: Row) -> float:
        return math.inf if math.isnan(row.ratio) else row.ratio

    records = []
    for (place, mode), group in sorted(
        grouped.items(), key=lambda item: (position.get(item[0][0], len(position)), item[0][1])
    ):
        worst = max(group, key=severity)
        measured = worst.measurement
        records.append(
            TapRecord(
                tap=place.path,
                layer=place.layer,
                mode=mode,
                verdict="diverges" if worst.diverges else "conforms",
                ratio=worst.ratio,
                statistic=worst.statistic,
                observed=worst.observed,
                limit=worst.limit,
                relative_error=measured.relative,
                case=measured.prompt,
                cases=len(group),
                elements=sum(r.measurement.rows * r.measurement.columns for r in group),
                returned=measured.returned,
                note=worst.note,
            )
        )
    return tuple(records)


def tensor_records(arrivals: Iterable[Arrival]) -> tuple[TensorRecord, ...]:
    """Return what became of each tensor."""
    return tuple(TensorRecord(a.tensor, a.arrived, a.detail) for a in arrivals)


def failure_records(failures: Iterable[Failure]) -> tuple[FailureRecord, ...]:
    """Return the failed calls."""
    return tuple(FailureRecord(f.place.path, f.prompt, f.reason, f.detail) for f in failures)


def logit_records(summaries: Iterable[LogitSummary]) -> tuple[LogitRecord, ...]:
    """Return the logits in people's terms."""
    records = []
    for summary in summaries:
        fields = asdict(summary)
        records.append(LogitRecord(case=fields.pop("prompt"), **fields))
    return tuple(records)


def conversion_record(cost: Conversion | None) -> ConversionRecord | None:
    """Return the cost of the weights' conversion."""
    return None if cost is None else ConversionRecord(**asdict(cost))
