"""``mpt-conform peers``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import BadInput
from harness.peers.campaign import chosen, installed, questions, run
from harness.peers.cell import Cell, Speed
from harness.peers.features import FEATURES
from harness.peers.healthy import PREFIX, healthy_questions, is_healthy_case
from harness.peers.record import Record
from harness.subjects.peers.registry import PEERS
from harness.subjects.protocol import STORAGE_DTYPES


@dataclass(frozen=True)
class Options:
    """Fields as the options of the command."""

    only: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = STORAGE_DTYPES
    healthy: int = 0
    speed: int = 0
    threads: tuple[int, ...] = (1, 2)
    pythons: dict[str, str] = field(default_factory=dict)
    record: Path | None = None
    processes: int = 1
    show: bool = False


def folder() -> Path:
    """Return where the checkpoints of the features are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mpt-conformance" / "peers"


def answer(
    options: Options,
    progress: Callable[[str], None],
    ready: Callable[[], None] = lambda: None,
) -> tuple[Sequence[Cell], Sequence[Speed]]:
    """Ask what is asked, and return everything that the record holds.

    Raises
    ------
    BadInput
        If a peer, a feature or a dtype is not known, or nothing can be asked.
    """
    record = Record(options.record)
    if options.show:
        if not record.cells and not record.speeds:
            raise BadInput("holds nothing to show", where="--record", found=options.record)
        return list(record.cells.values()), list(record.speeds.values())
    # What runs in another environment is timed there, and asked there by a command of its own.
    able = tuple(dict.fromkeys((*installed(), *options.pythons)))
    names = chosen(options.only, able, "--only")
    here = folder()
    here.mkdir(parents=True, exist_ok=True)
    if options.speed:
        from harness.peers.speed import measure

        for threads in options.threads:
            record.add(
                measure(
                    names, here, threads, options.speed, progress,
                    pythons=options.pythons, ready=ready,
                )
            )  # fmt: skip
    elif options.healthy:
        dtypes = [PEERS[name].dtypes if name in PEERS else STORAGE_DTYPES for name in names]
        run(
            healthy_questions(names, options.healthy, dtypes),
            record, here, progress, options.processes,
        )  # fmt: skip
    else:
        known = (*FEATURES, *filter(is_healthy_case, options.features))
        features = chosen(options.features or tuple(FEATURES), known, "--feature")
        dtypes_asked = [dtype for dtype in options.dtypes]
        run(questions(names, features, dtypes_asked), record, here, progress, options.processes)
    return list(record.cells.values()), list(record.speeds.values())


def summary(cells: Sequence[Cell]) -> str:
    """Return one line that counts the states."""
    asked = [cell for cell in cells if not cell.feature.startswith(PREFIX)]
    counts = {state: sum(c.state == state for c in asked) for state in {c.state for c in asked}}
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return f"{len({c.peer for c in asked})} peers, {len(asked)} cells: {words}" if asked else ""
