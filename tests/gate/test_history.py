"""The recorded history: its figures are real, and the gate sees what was planted."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from harness.gate.baseline import growth, of_limit, single
from harness.gate.evaluate import History, _found
from harness.gate.policy import Budget as NoBudget
from harness.gate.policy import Drift, Policy, Runs
from harness.judge.factors import shipped
from harness.ledger.records import Cell
from harness.ledger.store import Ledger

MAKE = Path(__file__).parents[2] / "examples" / "history" / "make.py"
WITHIN = 12
"""Runs after which the creep must have blocked; docs/gate.md states the same number."""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("history_make", MAKE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks for its own module by name.
    import sys

    sys.modules["history_make"] = module
    spec.loader.exec_module(module)
    return module


make = load()
PLAN = make.plan()


def test_the_history_is_what_the_plan_says(recorded):
    with Ledger.open(recorded) as ledger:
        runs = ledger.runs()
    assert len(runs) == len(PLAN) >= 60
    assert len({run.inputs for run in runs}) == len(runs), "two runs had the same tokens"
    assert [run.seeds["tokens"] for run in runs] == [step.number for step in PLAN]
    assert all(run.commit for run in runs)
    for run, step in zip(runs, PLAN, strict=True):
        assert (run.subject, run.dtype, run.fault) == (step.subject, step.dtype, step.fault or "")
        assert run.environment["threads"] == str(step.threads)
        assert run.verdict == ("diverges" if step.fault else "conforms")
    assert len({run.checkpoint for run in runs}) == 3
    assert {run.dtype for run in runs} == {"float16", "bfloat16", "float32"}
    assert sum(step.age > 0 for step in PLAN) == make.CREEPING


def sample() -> list[Any]:
    """One run of every kind, from those with as many threads as a test has."""
    kinds: dict[Any, Any] = {}
    for step in PLAN:
        if step.threads == 1:
            kinds[step.subject, step.dtype, step.weights, step.fault, step.age > 0] = step
    return list(kinds.values())


@pytest.mark.parametrize("step", sample(), ids=lambda step: f"run-{step.number}")
def test_a_sample_of_the_stored_values_comes_out_again(recorded, tmp_path, monkeypatch, step):
    """As close as two healthy runs lie: float32 sums hang on where operands lie in memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPT_CONFORM_COMMIT", "c" * 40)
    if "TVM_NUM_THREADS" not in os.environ:
        monkeypatch.setenv("TVM_NUM_THREADS", "1")
    with Ledger.open("again.db", write=True) as ledger:
        make.run(step, ledger, tmp_path)
    with Ledger.open("again.db") as ledger:
        (now,) = ledger.runs()
        found = ledger.values()[now.id]
    with Ledger.open(recorded) as ledger:
        then = ledger.runs()[step.number]
        stored = ledger.values([then.id])[then.id]
    assert (now.inputs, now.checkpoint, now.verdict) == (then.inputs, then.checkpoint, then.verdict)
    key = lambda value: (value.mode, value.tap, value.metric)  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, stored))
    if not step.fault:
        for one, other in ((found, stored), (stored, found)):
            grown = growth(of_limit(one), single(of_limit(other)), then.dtype, shipped())
            assert grown is not None and grown.of_allowed <= 1


def findings(recorded: Path, cell: Cell) -> list[tuple[Any, dict[str, Any]]]:
    """Return what the gate would have found after each run of a cell."""
    policy = Policy(Path("gate.toml"), (), Path("none"), Runs("any"), {}, NoBudget(0, 1.0), Drift())
    with Ledger.open(recorded) as ledger:
        runs = ledger.runs(cell)
        values = ledger.values([run.id for run in runs])
        anchor = ledger.current_anchors()[cell]
    made = []
    for at, run in enumerate(runs):
        history = History(runs[: at + 1], values, anchor)
        every = _found(policy, history, [run], shipped())
        made.append((run, {finding.check: finding for finding in every}))
    return made


def test_no_healthy_run_of_the_history_would_have_blocked(recorded):
    with Ledger.open(recorded) as ledger:
        cells = {run.cell for run in ledger.runs()}
    seen = 0
    for cell in cells:
        for run, every in findings(recorded, cell):
            if run.fault or run.seeds.get("age"):
                continue
            blocking = {name: f.text for name, f in every.items() if f.blocks}
            assert blocking == {}, run.id
            seen += 1
    assert seen == sum(not step.fault and not step.age for step in PLAN)


def test_the_creep_blocks_in_time_although_every_step_passes(recorded):
    with Ledger.open(recorded) as ledger:
        cell = next(run.cell for run in ledger.runs() if run.seeds.get("age"))
    blocked = []
    for run, every in findings(recorded, cell):
        age = run.seeds.get("age", 0)
        # Day over day nothing is wrong: the verdict, the anchor and the baseline all pass.
        for check in ("verdict", "anchor", "baseline", "top1", "perplexity"):
            assert not every[check].blocks, (age, every[check].text)
        if every["drift"].blocks:
            blocked.append(age)
    assert blocked, "the creep was never seen"
    assert 0 < blocked[0] <= WITHIN
    # Once raised, the alarm stands for as long as the creep goes on.
    assert blocked == list(range(blocked[0], make.CREEPING + 1))


def test_the_change_of_environment_is_recorded_and_blocks_nothing(recorded):
    with Ledger.open(recorded) as ledger:
        relax = [
            run for run in ledger.runs() if run.subject == "relax" and run.seeds["weights"] == 3
        ]
    mine = [run for run in relax if run.dtype == "float16"]
    assert {run.environment["threads"] for run in mine} == {"1", "2"}
    assert all(run.verdict == "conforms" for run in mine)
