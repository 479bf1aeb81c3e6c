"""Running a campaign: in parallel, in pieces that share a checkpoint, and not twice."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness.allocator import keep_freed_memory
from harness.certify.results import FaultRun, HealthyRun, Record, Run
from harness.faults.library import library
from harness.faults.model import PATHS
from harness.judge import factors as judge_factors

_RUNS = ("healthy.py", "observe.py", "planting.py")
"""What of this package decides a result; the rest only counts and draws."""
_ASIDE = {
    "commands", "report", "shrink", "generate", "ledger", "gate", "dashboard", "peers", "templates",
    "__pycache__",
}  # fmt: skip
"""Rooms that no verdict hangs on."""
_DOORS = {"cli.py", "pytest_plugin.py"}
"""What of the engine only takes words and gives them back."""
WHOLE = 12
"""Faults of one exposure that one process checks in a row: they share golden and orders."""


@dataclass(frozen=True)
class Plan:
    """What a campaign runs.

    Attributes
    ----------
    faults
        Names and layers.
    seeds
        Of healthy checkpoints; ``None`` among them is the trained one.
    dtype, target
        Of the planted faults; healthy runs take every dtype.
    """

    faults: tuple[tuple[str, int | None], ...]
    seeds: tuple[int | None, ...]
    dtype: str
    target: str


def stamp(target: str) -> str:
    """Return a digest of all that a result on a target depends on: factors, engine, port, cases."""
    root = Path(__file__).parent.parent.parent
    digest = hashlib.sha256()
    for room in ("cases", "harness", "reference", "relax_impl"):
        for path in sorted((root / room).rglob("*")):
            skipped = _ASIDE & set(path.parts)
            skipped |= {"certify"} & set(path.parts) if path.name not in _RUNS else set()
            if path.parent.name == "harness":
                skipped |= _DOORS & {path.name}
            if target == "llvm" and "kernels" in path.parts:
                skipped |= {"cuda"} & set(path.parts)
            if path.suffix in (".py", ".json") and not skipped:
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def factors_digest() -> str:
    """Return the digest of the factors that the gate judges by."""
    path = Path(judge_factors.__file__).with_name(judge_factors.FILE)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled(names: Sequence[str], every: int) -> tuple[str, ...]:
    """Return every n-th fault, at least one of each area."""
    faults = library()
    chosen = set(names[::every])
    areas = {faults[name].area for name in chosen}
    for name in names:
        if faults[name].area not in areas:
            areas.add(faults[name].area)
            chosen.add(name)
    return tuple(name for name in names if name in chosen)


def _settle() -> None:
    """Keep libraries from starting threads of their own beside as many processes as cores."""
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    keep_freed_memory()


def _plant(pieces: Sequence[tuple[str, int | None]], plan: Plan) -> list[FaultRun]:
    from harness.certify.planting import plant

    with tempfile.TemporaryDirectory() as folder:
        return [plant(name, layer, plan.dtype, plan.target, Path(folder)) for name, layer in pieces]


def _healthy(seed: int | None, plan: Plan) -> list[HealthyRun]:
    from harness.certify.healthy import healthy

    return healthy(seed, plan.target)


def _pieces(
    faults: Sequence[tuple[str, int | None]],
) -> Iterator[tuple[tuple[str, int | None], ...]]:
    """Group faults, so that what a group shares is made once, by one process.

    That is golden and orders of an exposure, and the templates of the tap that a fault shows at:
    many faults of one exposure are parted by their taps. The long groups come first, and those that
    can be filled in anywhere last.
    """
    many = Counter(library()[name].exposure for name, _ in faults)
    groups: dict[tuple[Any, ...], list[tuple[str, int | None]]] = {}
    for name, layer in faults:
        fault = library()[name]
        if many[fault.exposure] <= WHOLE:
            key: tuple[Any, ...] = (1, fault.exposure)
        elif fault.first_tap.startswith(PATHS):
            # Templates of the paths are the dearest.
            key = (0, fault.exposure)
        else:
            key = (2, fault.exposure, fault.first_tap, layer)
        groups.setdefault(key, []).append((name, layer))
    for _, group in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        yield tuple(group)


def run(
    plan: Plan,
    record: Record,
    progress: Callable[[str], None],
    processes: int = 2,
) -> list[Run]:
    """Run what the record does not hold yet, and return all of the plan's results.

    Parameters
    ----------
    plan
        What to run.
    record
        Is filled as results come; a campaign that was cut short goes on from it.
    progress
        Called with a sentence after each piece.
    processes
        At once; the results do not depend on it.
    """
    waiting = [
        (name, layer)
        for name, layer in plan.faults
        if f"fault {name}" + ("" if layer is None else f"@{layer}") not in record.runs
    ]
    judged = {r.weights for r in record.runs.values() if isinstance(r, HealthyRun)}
    seeds = [seed for seed in plan.seeds if _weights(seed) not in judged]
    done, total = 0, len(waiting) + len(seeds)
    plantings = [(_plant, piece, len(piece)) for piece in _pieces(waiting)]
    # Processes of their own: what the others remember of exposures slows a seed threefold.
    for tasks in (plantings, [(_healthy, seed, 1) for seed in seeds]):
        for count, results in _carried_out(tasks, plan, processes):
            record.add(results)
            done += count
            progress(f"{done} of {total}")
    wanted = {f"fault {n}" + ("" if at is None else f"@{at}") for n, at in plan.faults}
    weights = {_weights(seed) for seed in plan.seeds}
    return [
        run
        for run in record.runs.values()
        if (run.key in wanted if isinstance(run, FaultRun) else run.weights in weights)
    ]


def _carried_out(
    tasks: Sequence[tuple[Callable[..., Any], Any, int]], plan: Plan, processes: int
) -> Iterator[tuple[int, Any]]:
    """Yield how much each task was and what it gave, as they are done."""
    if not tasks:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_settle) as pool:
        futures = {pool.submit(do, what, plan): size for do, what, size in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _weights(seed: int | None) -> str:
    from harness.certify.healthy import TRAINED

    return TRAINED if seed is None else f"seed {seed}"
