"""``mpt-conform gate``: fresh or recorded runs, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from harness.errors import BadInput, NotProven
from harness.gate.evaluate import History, Release, evaluate, speaking_runs
from harness.gate.findings import GateResult
from harness.gate.policy import Policy, Required, read_policy
from harness.gate.waivers import read_waivers
from harness.judge.factors import shipped
from harness.ledger import identity
from harness.ledger.records import Cell
from harness.ledger.store import Ledger


def gate(
    policy: Path,
    ledger: str,
    *,
    release: str,
    commit: str | None,
    fresh: bool,
    progress: Callable[[str], None],
) -> GateResult:
    """Hold a policy against a ledger.

    Parameters
    ----------
    policy
        ``gate.toml``.
    ledger
        File or URL.
    release
        Its name, for the reports.
    commit
        What is released; that of the current directory if not given.
    fresh
        Make the run of every required cell that has none which speaks for the release.

    Raises
    ------
    BadInput
        If policy, waivers or ledger cannot be used.
    """
    read = read_policy(policy)
    waivers = read_waivers(read.waivers)
    known = commit if commit is not None else identity.commit()
    if read.runs.commit == "same" and not known:
        raise BadInput(
            "is not known here", where="--commit", hint="say it, or run inside a git repository"
        )
    at = identity.now()
    asked = Release(release, known, at, ledger)
    missing: dict[Cell, str] = {}
    with Ledger.open(ledger, write=fresh) as opened:
        if fresh:
            missing = _make_missing(read, asked, opened, progress)
        found = histories(opened, (required.cell for required in read.required))
        asked = Release(release, known, at, opened.where)
    return evaluate(read, asked, found, waivers, shipped(), missing)


def histories(ledger: Ledger, cells: Iterable[Cell]) -> dict[Cell, History]:
    """Return what a ledger knows of some cells."""
    anchors = ledger.current_anchors()
    found = {}
    for cell in cells:
        runs = ledger.runs(cell)
        if runs:
            values = ledger.values([run.id for run in runs])
            found[cell] = History(runs, values, anchors.get(cell))
    return found


def _make_missing(
    policy: Policy, release: Release, ledger: Ledger, progress: Callable[[str], None]
) -> dict[Cell, str]:
    """Run what has no run; a device that is not there leaves a gap, and a reason."""
    missing = {}
    for required in policy.required:
        speaking, _ = speaking_runs(policy, release, ledger.runs(required.cell))
        if speaking:
            continue
        progress(f"{required}")
        try:
            _run(required, release, ledger, progress)
        except NotProven as error:
            missing[required.cell] = str(error)
    return missing


def _run(
    required: Required, release: Release, ledger: Ledger, progress: Callable[[str], None]
) -> None:
    if required.path is None:
        raise NotProven(
            "has no path", where=f"checkpoint {required.checkpoint}", hint="a fresh run needs one"
        )
    from harness.ledger.record import check_into
    from harness.pipeline import Request

    cell = required.cell
    request = Request(
        checkpoint=required.path, subject=cell.subject, dtype=cell.dtype, target=cell.target
    )
    report = check_into(ledger, request, progress, commit=release.commit)
    if report.checkpoint.digest != cell.checkpoint:
        raise BadInput(
            "is another checkpoint than the policy names",
            where=str(required.path),
            expected=cell.checkpoint[:12],
            found=report.checkpoint.digest[:12],
        )
