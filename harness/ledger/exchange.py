"""Bringing runs from one ledger into another, and pinning anchors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import BadInput
from harness.ledger import identity
from harness.ledger.records import Anchor, Entry
from harness.ledger.store import Ledger


def take_in(source: Path, ledger: str) -> tuple[int, int]:
    """Add the runs and anchors of a file or a folder to a ledger, all or none.

    Returns
    -------
    tuple of int
        Runs added, and runs that were there already.

    Raises
    ------
    BadInput
        If the source is damaged or no ledger; it is read whole before anything is written.
    """
    entries, anchors = _read(source)
    with Ledger.open(ledger, write=True) as opened:
        known = {run.id for run in opened.runs()}
        pinned = {(anchor.run, anchor.pinned) for anchor in opened.anchors()}
        opened.write(*entries)
        for anchor in anchors:
            if (anchor.run, anchor.pinned) not in pinned:
                opened.pin(anchor)
    there = sum(entry.run.id in known for entry in entries)
    return len(entries) - there, there


def _read(source: Path) -> tuple[Sequence[Entry], Sequence[Anchor]]:
    from harness.ledger.sqlite_file import require_ledger

    try:
        folder = source.is_dir()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(source)) from error
    if folder:
        from harness.ledger.parquet import read

        return read(source)
    require_ledger(source, whole=True)
    with Ledger.open(source) as opened:
        return list(opened.entries()), opened.anchors()


def pin(ledger: str, runs: Sequence[str], *, reason: str, release: str) -> list[Anchor]:
    """Pin runs as the anchors of their cells.

    Raises
    ------
    BadInput
        If a run is not there, did not conform, or no reason is given.
    """
    if not reason.strip():
        raise BadInput("is empty", where="--reason", expected="why these runs are accepted")
    made = []
    with Ledger.open(ledger, write=True) as opened:
        for run in map(opened.find, runs):
            if run.verdict != "conforms":
                raise BadInput(
                    "is no anchor", where=run.id, expected="a run that conforms", found=run.verdict
                )
            if run.fault:
                raise BadInput("is no anchor: a fault was planted", where=run.id, found=run.fault)
            at = identity.now().isoformat(timespec="microseconds")
            made.append(Anchor(run.cell, run.id, at, release, reason))
        for anchor in made:
            opened.pin(anchor)
    return made
