"""All installed peers on all features: what is not in the record yet, in processes of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.peers.ask import versions
from harness.peers.cell import OWN, Cell
from harness.peers.features import Feature
from harness.peers.healthy import feature_of
from harness.peers.record import Record
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
    done = len(asked) - len(waiting)
    if processes == 1:
        for (feature, dtype), names in groups.items():
            _settle()
            for name in names:
                cell = _answer(name, feature, dtype, folder)
                record.add([cell])
                done += 1
                progress(_line(done, len(asked), cell))
            _forget()
    elif groups:
        with ProcessPoolExecutor(processes, get_context("spawn"), _settle) as pool:
            futures: dict[Future[Any], tuple[str, str]] = {
                pool.submit(_group, names, feature, dtype, folder): (feature, dtype)
                for (feature, dtype), names in groups.items()
            }
            for future in as_completed(futures):
                for cell in future.result():
                    record.add([cell])
                    done += 1
                    progress(_line(done, len(asked), cell))
    return tuple(record.cells[name, feature.name, dtype] for name, feature, dtype in asked)


def _line(done: int, total: int, cell: Cell) -> str:
    found = f" ({cell.found})" if cell.found else f" ({cell.reason})" if cell.reason else ""
    where = f"{cell.peer}, {cell.feature}, {cell.dtype}"
    return f"{done} of {total}: {where}: {cell.state}{found} [{cell.seconds:.1f} s]"


def _settle() -> None:
    """Keep libraries from starting threads of their own, and the oracle from asking twice."""
    from harness.certify.observe import remember

    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    remember()


def _forget() -> None:
    from harness.certify.observe import remember

    remember()()


def _answer(name: str, feature: str, dtype: str, folder: Path) -> Cell:
    import warnings

    from harness.peers.ask import ask

    with warnings.catch_warnings():
        # Of the peers' own libraries, about themselves.
        warnings.simplefilter("ignore")
        return ask(name, feature_of(feature), dtype, folder, lambda text: None)


def _group(names: Sequence[str], feature: str, dtype: str, folder: Path) -> list[Cell]:
    cells = [_answer(name, feature, dtype, folder) for name in names]
    _forget()
    return cells
