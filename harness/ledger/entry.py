"""From the report of a check to an entry of the ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from harness.ledger import identity, records
from harness.ledger.records import Entry, Run, Value
from harness.report.files import plain
from harness.report.record import LogitRecord, Report, TapRecord


def entry(
    report: Report,
    *,
    subject: str,
    extras: Mapping[str, Any],
    inputs: str,
    seeds: Mapping[str, int] | None = None,
    commit: str | None = None,
) -> Entry:
    """Return what the ledger keeps of a check.

    Parameters
    ----------
    report
        The check.
    subject
        What was asked for, as ``check --subject`` takes it.
    extras
        What the run page shows beyond the report; see `harness.ledger.witness`.
    inputs
        Digest of the token ids.
    seeds
        Of whatever was drawn for this run.
    commit
        Of the code that was judged; asked of the surroundings if not given.
    """
    at = identity.now()
    told = report.environment
    device, driver = identity.device(report.subject.target, told.get("cpu", ""))
    run = Run(
        id=identity.run_id(at),
        created=at.isoformat(timespec="microseconds"),
        commit=identity.commit() if commit is None else commit,
        subject=subject,
        name=report.subject.name,
        target=report.subject.target,
        dtype=report.subject.dtype,
        device=device,
        driver=driver,
        fault=report.subject.fault or "",
        checkpoint=report.checkpoint.digest,
        checkpoint_path=report.checkpoint.path,
        certificate=identity.certificate(report.subject.target),
        factors=identity.factors(),
        inputs=inputs,
        seeds=dict(seeds or {}),
        tvm=told.get("apache-tvm", ""),
        torch=told.get("torch", ""),
        transformers=told.get("transformers", ""),
        environment=dict(told),
        verdict=report.verdict,
        reason=report.reason,
        seconds=report.seconds,
        reproduce=report.reproduce,
    )
    # Arrived tensors are a number in the coverage; what matters of them are those that did not.
    kept = plain(report)
    kept["tensors"] = [tensor for tensor in kept["tensors"] if not tensor["arrived"]]
    return Entry(run, tuple(values(report)), {"report": kept, **extras})


def values(report: Report) -> Iterator[Value]:
    """Yield every metric of every tap."""
    for tap in report.taps:
        yield _value(tap, records.OF_LIMIT, tap.ratio)
        yield _value(tap, records.RELATIVE_ERROR, tap.relative_error)
    if report.logits:
        for metric, value in budgets(report.logits).items():
            yield Value("deployed", "logits", metric, _finite(value))


def budgets(logits: tuple[LogitRecord, ...]) -> dict[str, float]:
    """Return the deployed logits in the terms of a budget.

    Losses are means over a case's tokens, so that cases weigh by their positions.
    """
    positions = sum(case.positions for case in logits)
    agreed = sum(case.top1_agree + case.near_ties for case in logits)
    scored = [
        (case.positions, case.subject_loss - case.golden_loss)
        for case in logits
        if case.subject_loss is not None
        and case.golden_loss is not None
        and math.isfinite(case.subject_loss - case.golden_loss)
    ]
    weight = sum(count for count, _ in scored)
    found = {
        records.TOP1_BEYOND_TIES: float(positions - agreed),
        records.KL_MEAN: sum(case.kl_mean * case.positions for case in logits) / positions,
        records.KL_MAX: max(case.kl_max for case in logits),
    }
    if weight:
        mean = sum(count * loss for count, loss in scored) / weight
        found[records.PERPLEXITY_INCREASE] = math.expm1(mean)
    return found


def _value(tap: TapRecord, metric: str, value: float | None) -> Value:
    return Value(tap.mode, tap.tap, metric, _finite(value), tap.layer, tap.statistic)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
