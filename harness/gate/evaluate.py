"""From a policy and the runs of a ledger to findings: nothing is run and nothing is drawn."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from harness.gate import baseline
from harness.gate.certificates import certificate_finding
from harness.gate.drift import alarms
from harness.gate.findings import CellResult, Finding, GateResult
from harness.gate.policy import Policy, Required, Runs
from harness.gate.waivers import Waiver, covering
from harness.judge.factors import Factors
from harness.ledger.identity import factors as factors_digest
from harness.ledger.records import (
    PERPLEXITY_INCREASE,
    TOP1_BEYOND_TIES,
    Anchor,
    Cell,
    Run,
    Value,
)

_CUTS = ("--layers", "--max-tokens")
"""Options of `check` that leave out a part of the model or of its inputs."""
_CLOCKS = timedelta(minutes=5)
"""What the clocks of two hosts may be apart."""


@dataclass(frozen=True)
class History:
    """What a ledger knows of one cell, oldest run first."""

    runs: Sequence[Run]
    values: Mapping[str, Sequence[Value]]
    anchor: Anchor | None


@dataclass(frozen=True)
class Release:
    """What is released, and when the question is asked."""

    name: str
    commit: str
    at: datetime
    ledger: str


def evaluate(
    policy: Policy,
    release: Release,
    histories: Mapping[Cell, History],
    waivers: Sequence[Waiver],
    factors: Factors,
    missing: Mapping[Cell, str] | None = None,
) -> GateResult:
    """Hold a policy against what is known.

    Parameters
    ----------
    policy, release
        What must be proved, of what.
    histories
        By cell; a cell without a run may be absent.
    waivers
        All that there are.
    factors
        Calibrated safety factors.
    missing
        Why a fresh run of a cell could not be made.
    """
    certificates = {
        target: certificate_finding(place, figures)
        for target, (place, figures) in policy.certificates.items()
    }
    cells = []
    for required in policy.required:
        history = histories.get(required.cell, History((), {}, None))
        why = (missing or {}).get(required.cell, "")
        speaking, gap = speaking_runs(policy, release, history.runs, why)
        found = [gap]
        if speaking:
            found += _found(policy, history, speaking, factors)
        if required.cell.target in certificates:
            found.append(certificates[required.cell.target])
        cells.append(
            CellResult(
                subject=required.cell.subject,
                target=required.cell.target,
                dtype=required.cell.dtype,
                checkpoint=required.checkpoint,
                run=speaking[-1] if speaking else None,
                findings=tuple(_waived(f, required, waivers, release) for f in found),
                reproduce=speaking[-1].reproduce if speaking else reproduce(required),
            )
        )
    general = [_stale(waiver, release) for waiver in waivers if _over(waiver, release)]
    if all(cell.run is None and cell.state == "pass" for cell in cells):
        # Waivers may cover gaps, but not all there is.
        text = "not proven: no required cell has a run that speaks for this release"
        general.append(Finding("run", "not-proven", text))
    return GateResult(
        release=release.name,
        commit=release.commit,
        policy=str(policy.source),
        ledger=release.ledger,
        made=release.at.isoformat(timespec="seconds"),
        cells=tuple(cells),
        waivers=tuple(waivers),
        general=tuple(general),
    )


def reproduce(required: Required) -> str:
    """Return the command that makes the run of a cell."""
    words = ["mpt-conform", "check", str(required.path or required.checkpoint)]
    words += ["--subject", required.cell.subject, "--dtype", required.cell.dtype]
    return shlex.join([*words, "--target", required.cell.target])


def speaking_runs(
    policy: Policy, release: Release, runs: Sequence[Run], why: str = ""
) -> tuple[list[Run], Finding]:
    """Return the runs that speak for a release, and whether there is any."""
    found = list(runs)
    text = "no run of this cell"
    if policy.runs.commit == "same":
        found = [run for run in found if run.commit == release.commit and run.commit]
        if runs and not found:
            text = f"no run at commit {release.commit[:12] or '(unknown)'}; {len(runs)} at others"
    if policy.runs.factors == "same":
        limits = factors_digest()
        mine = [run for run in found if run.factors == limits]
        if found and not mine:
            text = f"run {found[-1].id} was judged by other factors ({found[-1].factors[:12]})"
        found = mine
    whole = [run for run in found if run.verdict != "conforms" or not shortfall(run, policy.runs)]
    if found and not whole:
        text = f"run {found[-1].id} {shortfall(found[-1], policy.runs)}"
    found = whole
    if policy.runs.max_age_days is not None:
        oldest = release.at - timedelta(days=policy.runs.max_age_days)
        past = [run for run in found if _made(run) <= release.at + _CLOCKS]
        if found and not past:
            text = f"run {found[-1].id} is dated {found[-1].created}, which is still to come"
        found = [run for run in past if _made(run) >= oldest]
        if past and not found:
            text = f"the newest run is older than {policy.runs.max_age_days:g} days"
    if not found:
        return [], Finding("run", "not-proven", f"not proven: {why or text}")
    newest = found[-1]
    same = [run for run in found if run.commit == newest.commit and run.commit]
    return same or [newest], Finding("run", "pass", f"run {newest.id}")


def _made(run: Run) -> datetime:
    return datetime.fromisoformat(run.created)


def shortfall(run: Run, accepted: Runs) -> str:
    """Return why a run that conforms proves nothing; empty if it does prove.

    What such a run finds wrong is wrong all the same.
    """
    if run.fault:
        return f"was of a planted fault, {run.fault}"
    cuts = _CUTS if accepted.prompts == "any" else (*_CUTS, "--prompts")
    cut = [word for word in cuts if word in run.reproduce.split()]
    return f"left out a part of the check ({', '.join(cut)})" if cut else ""


def _found(
    policy: Policy, history: History, speaking: Sequence[Run], factors: Factors
) -> list[Finding]:
    newest = speaking[-1]
    values = {run.id: history.values.get(run.id, ()) for run in history.runs}
    now = baseline.of_limit(values[newest.id])
    found = [_verdict(speaking)]
    found += _against_anchor(policy, history, newest, now, factors)
    before = [
        baseline.of_limit(values[run.id])
        for run in history.runs[: _index(history.runs, newest)]
        if run.verdict == "conforms" and not shortfall(run, policy.runs)
    ][-policy.drift.baseline_runs :]
    if before:
        grown = baseline.growth(now, baseline.rolling(before), newest.dtype, factors)
        found.append(_growth("baseline", f"the median of {len(before)} runs before", grown))
    else:
        found.append(Finding("baseline", "pass", "first run of this cell: no baseline yet"))
    found.append(_drift(policy, history, newest))
    found += _budget(policy, values[newest.id])
    return found


def _index(runs: Sequence[Run], wanted: Run) -> int:
    return next(at for at, run in enumerate(runs) if run.id == wanted.id)


def _verdict(speaking: Sequence[Run]) -> Finding:
    for state, verdict in (("fail", "diverges"), ("not-proven", "not-proven")):
        bad = [run for run in speaking if run.verdict == verdict]
        if bad:
            run = bad[-1]
            fault = f" with planted fault {run.fault}" if run.fault else ""
            reason = f": {run.reason}" if run.reason else ""
            return Finding("verdict", state, f"run {run.id} {verdict}{fault}{reason}")  # type: ignore[arg-type]
    return Finding("verdict", "pass", f"{len(speaking)} of {len(speaking)} runs conform")


def _against_anchor(
    policy: Policy,
    history: History,
    newest: Run,
    now: Mapping[baseline.Key, Value],
    factors: Factors,
) -> list[Finding]:
    if history.anchor is None:
        if policy.drift.anchor == "optional":
            return [Finding("anchor", "pass", "no anchor is pinned, none is required")]
        text = f"not proven: no anchor is pinned (mpt-conform anchor set {newest.id} ...)"
        return [Finding("anchor", "not-proven", text)]
    pinned = baseline.of_limit(history.values.get(history.anchor.run, ()))
    lost = sorted(" ".join(key) for key in pinned if key not in now)
    if lost:
        text = (
            f"not proven: {len(lost)} taps of anchor {history.anchor.run} were not compared, "
            f"as {lost[0]}"
        )
        return [Finding("anchor", "not-proven", text)]
    grown = baseline.growth(now, baseline.single(pinned), newest.dtype, factors)
    return [_growth("anchor", f"anchor {history.anchor.run}", grown)]


def _growth(check: str, against: str, grown: baseline.Growth | None) -> Finding:
    if grown is None:
        return Finding(check, "not-proven", f"not proven: nothing to compare with {against}")
    text = (
        f"{grown.mode} {grown.tap} is {grown.now:.3g} of its limit, {grown.before:.3g} in "
        f"{against}; allowed {grown.allowed:.3g}, {100 * grown.of_allowed:.0f} % of it reached"
    )
    return Finding(check, "fail" if grown.of_allowed > 1 else "pass", text)


def drift_series(history: History, until: Run) -> tuple[list[Run], dict[baseline.Key, list[float]]]:
    """Return the runs since the anchor, and of each tap that all of them have its values."""
    runs = list(history.runs)[: _index(history.runs, until) + 1]
    if history.anchor is not None:
        start = [at for at, run in enumerate(runs) if run.id == history.anchor.run]
        runs = runs[start[0] :] if start else runs
    tables = [baseline.of_limit(history.values.get(run.id, ())) for run in runs]
    # A run that failed before its taps says nothing of drift; its verdict does.
    kept = [(run, table) for run, table in zip(runs, tables, strict=True) if table]
    if not kept:
        return [], {}
    # Nor does one that compared less than the newest: it would end every series that it lacks.
    shared = list(kept[-1][1])
    kept = [(run, table) for run, table in kept if all(key in table for key in shared)]
    series = {}
    for key in shared:
        column = [table[key].value for _, table in kept]
        if any(value != 0 for value in column):
            series[key] = [math.inf if value is None else value for value in column]
    return [run for run, _ in kept], series


def _drift(policy: Policy, history: History, newest: Run) -> Finding:
    runs, series = drift_series(history, newest)
    every = policy.drift.false_alarm_every
    found = alarms(series, every)
    rate = f"at most one false alarm in {every} runs"
    if not found:
        return Finding("drift", "pass", f"no drift in {len(runs)} runs since the anchor ({rate})")
    first = found[0]
    more = f" and {len(found) - 1} more series" if len(found) > 1 else ""
    text = (
        f"{first.series} drifts: {first.first:.3g} of its limit in the beginning, {first.last:.3g} "
        f"now; alarm since run {runs[first.at].id}, evidence {first.evidence:.3g} x what is "
        f"needed{more} ({rate})"
    )
    return Finding("drift", "fail", text)


def _budget(policy: Policy, values: Sequence[Value]) -> list[Finding]:
    known = {value.metric: value.value for value in values if value.mode == "deployed"}
    found = []
    limits = (
        ("top1", TOP1_BEYOND_TIES, policy.budget.top1_beyond_ties, 1.0, "positions, no ties,"),
        (
            "perplexity",
            PERPLEXITY_INCREASE,
            policy.budget.perplexity_increase_percent,
            100.0,
            "% of perplexity",
        ),
    )
    for check, metric, limit, scale, unit in limits:
        if limit is None:
            continue
        value = known.get(metric)
        if value is None:
            found.append(Finding(check, "not-proven", f"not proven: the run has no {metric}"))
            continue
        text = f"{scale * value:.3g} {unit} lost, budget {limit:g}"
        found.append(Finding(check, "fail" if scale * value > limit else "pass", text))
    return found


def _waived(
    finding: Finding, required: Required, waivers: Sequence[Waiver], release: Release
) -> Finding:
    cell = required.cell
    waiver = covering(
        waivers,
        check=finding.check,
        subject=cell.subject,
        target=cell.target,
        dtype=cell.dtype,
        checkpoint=required.checkpoint,
    )
    if waiver is None or finding.state == "pass":
        return finding
    if _over(waiver, release):
        text = f"{finding.text}; waiver {waiver.file} expired on {waiver.expires}"
        return replace(finding, text=text, waiver=waiver.file)
    text = f"{finding.text}; waived until {waiver.expires} by the {waiver.owner}: {waiver.reason}"
    return replace(finding, text=text, waiver=waiver.file, waived=True)


def _over(waiver: Waiver, release: Release) -> bool:
    return waiver.expired(release.at.date())


def _stale(waiver: Waiver, release: Release) -> Finding:
    text = (
        f"waiver {waiver.file} ({waiver.owner}: {waiver.reason}) expired on {waiver.expires}; "
        "renew it with a reason, or remove it"
    )
    return Finding("waivers", "fail", text, waiver.file)
