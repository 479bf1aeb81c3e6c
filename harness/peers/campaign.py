"""All installed peers on all features: what is not in the record yet, in processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

from harness.errors import BadInput
from harness.peers.ask import versions
from harness.peers.cell import OWN, Cell
from harness.peers.features import Feature
from harness.peers.healthy import feature_of
from harness.peers.record import Record
from harness.peers.worker import Worker
from harness.subjects.peers.registry import PEERS
from harness.subjects.protocol import STORAGE_DTYPES

WIDEST = "float32"


def installed() -> tuple[str, ...]:
    """Return the port and every peer that can run here."""
    return (OWN, *(name for name, peer in PEERS.items() if not peer.missing))


def chosen(only: Sequence[str], known: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the names asked for, all of them if none is.

    Raises
    ------
    BadInput
        If one is not known.
    """
    unknown = [name for name in only if name not in known]
    if unknown:
        raise BadInput(
            "is not known or not installed",
            where=f"{where} {unknown[0]}",
            expected=", ".join(known),
        )
    return tuple(name for name in known if not only or name in only)


def questions(
    names: Sequence[str], features: Sequence[str], dtypes: Sequence[str]
) -> list[tuple[str, Feature, str]]:
    """Return what is asked, features first: peers asked one after another share the reference.

    The port is asked everything in every dtype; a peer what is core in every dtype of its own, and
    the rest in float32, or in the first of its dtypes where that is not one.
    """
    result = []
    for feature in map(feature_of, features):
        for dtype in dtypes:
            for name in names:
                own = STORAGE_DTYPES if name == OWN else PEERS[name].dtypes
                widest = WIDEST if WIDEST in own else own[0]
                if dtype in own and (name == OWN or feature.core or dtype == widest):
                    result.append((name, feature, dtype))
    return result


def run(
    asked: Sequence[tuple[str, Feature, str]],
    record: Record,
    folder: Path,
    progress: Callable[[str], None],
    processes: int = 1,
) -> tuple[Cell, ...]:
    """Ask what the record does not know, and return the answers to all.

    Parameters
    ----------
    asked
        See `questions`.
    record
        Is filled as answers come.
    folder
        Where checkpoints are kept.
    progress
        Called with a sentence after each answer.
    processes
        At once.
    """
    now = {name: versions(name) for name in {name for name, _, _ in asked}}
    waiting = [
        (name, feature.name, dtype)
        for name, feature, dtype in asked
        if not record.knows((name, feature.name, dtype), now[name])
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, feature, dtype in waiting:
        groups.setdefault((feature, dtype), []).append(name)
    todo: SimpleQueue[tuple[tuple[str, str], list[str]]] = SimpleQueue()
    for group in groups.items():
        todo.put(group)
    done = len(asked) - len(waiting)
    lock = Lock()

    def lane() -> None:
        nonlocal done
        worker = Worker()
        try:
            while True:
                try:
                    (feature, dtype), names = todo.get_nowait()
                except Empty:
                    return
                for name in names:
                    cell = worker.ask(name, feature, dtype, folder)
                    with lock:
                        record.add([cell])
                        done += 1
                        progress(_line(done, len(asked), cell))
                worker.forget()
        finally:
            worker.close()

    with ThreadPoolExecutor(processes) as pool:
        for running in [pool.submit(lane) for _ in range(min(processes, len(groups)))]:
            running.result()
    return tuple(record.cells[name, feature.name, dtype] for name, feature, dtype in asked)


def _line(done: int, total: int, cell: Cell) -> str:
    found = f" ({cell.found})" if cell.found else f" ({cell.reason})" if cell.reason else ""
    where = f"{cell.peer}, {cell.feature}, {cell.dtype}"
    return f"{done} of {total}: {where}: {cell.state}{found} [{cell.seconds:.1f} s]"
