"""A check whose run goes into a ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.ledger.entry import entry
from harness.ledger.store import Ledger
from harness.ledger.witness import Listener, listening
from harness.pipeline import Request, check
from harness.report.record import Report


def check_into(
    ledger: Ledger,
    request: Request,
    progress: Callable[[str], None] = lambda text: None,
    *,
    given: Any = None,
    seeds: Mapping[str, int] | None = None,
    commit: str | None = None,
) -> Report:
    """Judge a subject and write the run, whatever its verdict.

    Parameters
    ----------
    ledger
        Open for writing.
    request, progress, given
        As `harness.pipeline.check` takes them.
    seeds, commit
        What identifies the run besides; see `harness.ledger.entry.entry`.
    """
    listener = Listener(request.checkpoint)
    with listening(listener):
        report = check(request, progress, given=given, witness=listener.see)
    ledger.write(
        entry(
            report,
            subject="traces" if request.traces else request.subject,
            extras=listener.extras(),
            inputs=listener.inputs,
            seeds=seeds,
            commit=commit,
        )
    )
    return report
