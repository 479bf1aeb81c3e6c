"""A history of checks that were really run: healthy ones, an order after another, a break, a creep.

    python examples/history/make.py FOLDER    # makes FOLDER/ledger.db and FOLDER/tables

Every run has other tokens. What is planted: a fault in the last run of `relax` in bfloat16; an
error that grows by a tenth from run to run in `own_mpt`; twice the threads from the middle of
`relax` in float16 on. Everything else is healthy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

CONFIG = json.loads(Path(__file__).with_name("config.json").read_text())
OWN = "examples.own_mpt:load"
ORDERED = "examples.history.subjects:Ordered"
BREAK = "alibi-inverse-square"
HEALTHY, CREEPING = 36, 15


@dataclass(frozen=True)
class Step:
    """One run.

    Attributes
    ----------
    number
        Its place in the history, and the seed of its tokens.
    weights
        Seed of the checkpoint.
    age
        Runs that a planted error has had to grow; 0 for none.
    order
        Which evaluation order, for the subject that has several.
    """

    number: int
    subject: str
    dtype: str
    weights: int = 3
    fault: str | None = None
    age: int = 0
    order: int = 0
    threads: int = 1


def plan() -> list[Step]:
    """Return the whole history, oldest first."""
    made: list[dict[str, Any]] = []
    for at in range(16):
        made.append({"subject": "relax", "dtype": "float16", "threads": 1 if at < 8 else 2})
    made += [{"subject": "relax", "dtype": "float32"} for _ in range(3)]
    made += [{"subject": "relax", "dtype": "float16", "weights": seed} for seed in (4, 5)]
    for dtype in ("float16", "bfloat16"):
        made += [{"subject": ORDERED, "dtype": dtype, "order": at} for at in range(5)]
    made += [{"subject": "relax", "dtype": "bfloat16"} for _ in range(6)]
    made.append({"subject": "relax", "dtype": "bfloat16", "fault": BREAK})
    made += [{"subject": OWN, "dtype": "float16"} for _ in range(HEALTHY)]
    made += [{"subject": OWN, "dtype": "float16", "age": at + 1} for at in range(CREEPING)]
    return [Step(number=at, **fields) for at, fields in enumerate(made)]


def run(step: Step, ledger: Any, folder: Path) -> Any:
    """Run one step into a ledger; the current directory is ``folder``, so that no path shows."""
    import numpy as np

    from cases.synthetic import make_checkpoint
    from examples.history.subjects import Creeping, Ordered
    from harness.ledger.record import check_into
    from harness.pipeline import Request

    checkpoint = Path(f"checkpoint-{step.weights}")
    if not (folder / checkpoint).exists():
        make_checkpoint(folder / checkpoint, CONFIG, seed=step.weights, dtype="float32")
    prompts = Path(f"prompts-{step.number}.json")
    ids = np.random.default_rng(step.number).integers(0, CONFIG["vocab_size"], (2, 24))
    (folder / prompts).write_text(json.dumps(ids.tolist()))
    given: Any = None
    if step.subject == OWN:
        given = Creeping(folder / checkpoint, step.dtype, step.age)
    elif step.subject == ORDERED:
        given = Ordered(folder / checkpoint, step.dtype, step.order)
    request = Request(
        checkpoint=checkpoint,
        subject=step.subject,
        dtype=step.dtype,
        prompts=str(prompts),
        fault=step.fault,
        diagnose=False,
    )
    seeds = {"tokens": step.number, "weights": step.weights}
    seeds |= {"age": step.age} if step.age else {}
    seeds |= {"order": step.order} if step.subject == ORDERED else {}
    return check_into(ledger, request, given=given, seeds=seeds)


def _groups(steps: list[Step]) -> Iterator[list[Step]]:
    """Yield runs of steps with the same threads: a process keeps those that it began with."""
    group: list[Step] = []
    for step in steps:
        if group and step.threads != group[-1].threads:
            yield group
            group = []
        group.append(step)
    yield group


def _work(folder: Path, first: int, last: int) -> None:
    from harness.ledger.store import Ledger

    os.chdir(folder)
    with Ledger.open("ledger.db", write=True) as ledger:
        for step in plan()[first : last + 1]:
            report = run(step, ledger, folder)
            print(step.number, report.verdict, step.subject, step.dtype, step.age or "", flush=True)


def main(folder: Path) -> None:
    """Make the whole history."""
    from harness.ledger.exchange import pin
    from harness.ledger.parquet import export
    from harness.ledger.store import Ledger

    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for group in _groups(plan()):
        threads = str(group[0].threads)
        env = {**os.environ, "TVM_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        # The runs stand in a folder of their own, outside of the repository that they judge.
        env["MPT_CONFORM_COMMIT"] = head.stdout.strip()
        words = [sys.executable, __file__, str(place), str(group[0].number), str(group[-1].number)]
        subprocess.run(words, check=True, env=env, cwd=ROOT)
    ledger = str(place / "ledger.db")
    with Ledger.open(ledger) as opened:
        first: dict[Any, str] = {}
        for one in opened.runs():
            if one.verdict == "conforms":
                first.setdefault(one.cell, one.id)
    pin(ledger, list(first.values()), reason="first run of its cell", release="history")
    with Ledger.open(ledger) as opened:
        print(export(opened, place / "tables"), "runs")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
