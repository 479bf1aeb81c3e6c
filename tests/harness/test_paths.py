"""Every path of a deployment is held against the plain forward, and each check can turn red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput
from harness.faults import calls as call_faults
from harness.faults import paths as path_faults
from harness.faults.library import library
from harness.faults.model import Planted
from harness.inputs import load_cases
from harness.judge.factors import shipped
from harness.judge.verdict import Row, judge
from harness.measure.oracle import Oracle
from harness.measure.paths import CHECKS, LENGTH, ROWS, path_events, rows_of
from harness.measure.records import Event, Failure, Measurement, Skip
from harness.measure.relations import RELATIONS, WINDOW, moved_heads, relation_events
from harness.measure.run import Case
from harness.subjects.protocol import PATH_METHODS, path_capabilities, rounding_of, validate
from harness.subjects.relax import RelaxSubject
from harness.subjects.torch import TorchSubject
from reference.config import MPTConfig

FAULTS = {fault.name: fault for fault in (*path_faults.FAULTS, *call_faults.FAULTS)}
NAMES = [one.name for one in (*CHECKS, *RELATIONS)]
RED = {
    "prefill": "cached-bias-absent",
    "decode": "decode-bias-absent",
    "extend": "chunk-mask-ignores-past",
    "chunks": "chunk-keys-reversed",
    "batch-order": "decode-reads-row-before",
    "batch-width": "chunk-reads-row-0",
    "ragged": "decode-key-one-slot-early",
    "left-padding": "padding-seen-in-decode",
    "translation": "padding-mask-one-short",
    "vocabulary": "decode-last-rows-unknown",
    "fork": "fork-shares-cache",
    "roll-back": "roll-back-one-short",
    "lengths": "lengths-align-right",
    "heads": "alibi-heads-rolled",
    "far-window": "mask-blocks-of-32",
}
"""Of the library, for every check of the paths."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def events_of(checkpoint: Path, subject: Any, dtype: str = "float32") -> list[Event]:
    opened = Checkpoint.open(checkpoint)
    config = MPTConfig.from_dict(opened.config)
    oracle = Oracle(config, opened.read, storage=dtype, rounding=rounding_of(subject))
    cases = load_cases(None, config, checkpoint, max_tokens=None)
    return [*path_events(oracle, subject, cases), *relation_events(oracle, subject)]


def judged(events: list[Event], dtype: str = "float32") -> dict[str, Row]:
    rows = [judge(event, dtype, shipped()) for event in events if isinstance(event, Measurement)]
    return {row.measurement.place.path.removeprefix("paths."): row for row in rows}


@pytest.fixture(scope="module")
def relax(checkpoint: Path) -> Callable[..., RelaxSubject]:
    made: dict[tuple[str, str | None], RelaxSubject] = {}

    def make(dtype: str = "float32", fault: str | None = None) -> RelaxSubject:
        if (dtype, fault) not in made:
            planted = Planted(library()[fault]) if fault else None
            made[dtype, fault] = RelaxSubject(checkpoint, dtype, "llvm", planted)
        return made[dtype, fault]

    return make


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_port_is_one_model_on_every_path(dtype: str, checkpoint: Path, relax: Any) -> None:
    events = events_of(checkpoint, relax(dtype), dtype)
    assert all(isinstance(event, Measurement) for event in events)
    rows = judged(events, dtype)
    assert list(rows) == NAMES
    assert not [name for name, row in rows.items() if row.diverges]
    # Every row of the batch, and more than one position of each.
    assert all(row.measurement.rows >= ROWS * 5 for row in rows.values())


def test_every_check_has_a_fault_of_its_own() -> None:
    assert set(RED) == set(NAMES)


@pytest.mark.parametrize(("check", "fault"), RED.items())
def test_each_check_turns_red(check: str, fault: str, checkpoint: Path, relax: Any) -> None:
    rows = judged(events_of(checkpoint, relax(fault=fault)))
    assert rows[check].diverges
    if library()[fault].area == "decode":
        assert not rows["heads"].diverges and not rows["far-window"].diverges
    if library()[fault].calls is None:
        assert rows["lengths"].ratio <= 1, "forward ignores lengths, with a fault and without"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=() if at % 4 == 0 else pytest.mark.long)
        for at, fault in enumerate(call_faults.FAULTS)
    ],
)
def test_a_fault_around_the_compiled_functions_shows_where_it_says(
    fault: Any, checkpoint: Path, relax: Any
) -> None:
    rows = judged(events_of(checkpoint, relax(fault=fault.name)))
    assert next(name for name, row in rows.items() if row.diverges) == (
        fault.first_tap.removeprefix("paths.")
    )


@pytest.mark.long
def test_a_fault_around_the_compiled_functions_is_caught_and_named(
    checkpoint: Path, conform: Any
) -> None:
    words = ["--fault", "fork-shares-cache", "--max-tokens", 12, "--dtype", "float32"]
    outcome = conform("check", checkpoint, *words, "--diagnose")
    assert outcome.code == 1
    assert outcome.first["tap"] == "paths.fork"
    assert outcome.report["diagnosis"]["fault"] == "fork-shares-cache"


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (6, 1), (12, 4), (2, 2)])
def test_moved_heads_keep_their_key_heads(heads: int, kv_heads: int) -> None:
    class Config:
        n_heads, kv_n_heads = heads, kv_heads

    moved, keys = moved_heads(Config)
    assert sorted(moved) == list(range(heads)) and list(moved) != list(range(heads))
    group = heads // kv_heads
    # The place h reads the key head of its own group, and finds the one that the head had.
    assert [keys[h // group] for h in range(heads)] == [moved[h] // group for h in range(heads)]


@pytest.mark.parametrize("slope", [1.01, 0.99])
def test_a_slope_that_is_a_percent_off_shows_when_heads_move(
    slope: float, checkpoint: Path
) -> None:
    class Bent(TorchSubject):
        protocol = 2

        def attend(self, q: Any, k: Any, v: Any) -> Any:
            # One head's slope alone is another: its keys are moved by as much.
            k = k.copy()
            k[..., 0, 3] += (slope - 1) * np.arange(k.shape[1])
            tensors = (self._tensor(a) for a in (q, k, v))
            return self._model.attend(*tensors).reshape(q.shape)

    rows = judged(events_of(checkpoint, Bent(checkpoint, "float32")))
    assert list(rows) == ["heads", "far-window"]
    assert rows["heads"].diverges


def test_the_reference_is_one_attention_in_its_own_order(checkpoint: Path) -> None:
    class Straight(TorchSubject):
        protocol = 2

        def attend(self, q: Any, k: Any, v: Any) -> Any:
            return self._model.attend(*(self._tensor(a) for a in (q, k, v))).reshape(q.shape)

    for dtype in ("float16", "bfloat16", "float32"):
        rows = judged(events_of(checkpoint, Straight(checkpoint, dtype), dtype), dtype)
        assert not [name for name, row in rows.items() if row.diverges]
        assert all(row.measurement.rows == WINDOW for row in rows.values())


class Wrapped:
    """The port, with one method of its own."""

    protocol = 2

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner, self._methods = inner, methods
        self.name, self.dtype, self.rounding = inner.name, inner.dtype, inner.rounding

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


def test_a_fork_that_shares_turns_red(checkpoint: Path, relax: Any) -> None:
    subject = Wrapped(relax(), fork=lambda state: state)
    rows = judged(events_of(checkpoint, subject))
    assert [name for name, row in rows.items() if row.diverges] == ["fork"]


def test_a_roll_back_that_forgets_nothing_turns_red(checkpoint: Path, relax: Any) -> None:
    subject = Wrapped(relax(), truncate=lambda state, lengths: state)
    rows = judged(events_of(checkpoint, subject))
    assert [name for name, row in rows.items() if row.diverges] == ["roll-back"]


def test_lengths_that_move_rows_turn_red(checkpoint: Path, relax: Any) -> None:
    inner = relax()

    def forward(ids: Any, lengths: Any = None) -> Any:
        logits = inner.forward(ids)
        return logits if lengths is None else np.roll(logits, ids.shape[1] - int(min(lengths)), 1)

    rows = judged(events_of(checkpoint, Wrapped(inner, forward=forward)))
    assert [name for name, row in rows.items() if row.diverges] == ["lengths"]


def test_a_failure_in_one_path_is_reported_and_the_others_go_on(
    checkpoint: Path, relax: Any
) -> None:
    def fork(state: Any) -> Any:
        raise RuntimeError("no memory")

    events = events_of(checkpoint, Wrapped(relax(), fork=fork))
    failures = [event for event in events if isinstance(event, Failure)]
    assert [(f.place.path, f.reason) for f in failures] == [
        ("paths.fork", "fork: raised RuntimeError: no memory")
    ]
    assert len(judged(events)) == len(NAMES) - 1


@pytest.mark.parametrize(
    ("method", "wrong", "reason"),
    [
        ("prefill", lambda *a: np.zeros(3), "prefill: returned ndarray, expected (logits, state)"),
        ("decode", lambda state, ids: np.zeros((1, 97)), "the result has shape (1, 97)"),
    ],
)
def test_what_the_protocol_does_not_allow(
    method: str, wrong: Any, reason: str, checkpoint: Path, relax: Any
) -> None:
    events = events_of(checkpoint, Wrapped(relax(), **{method: wrong}))
    assert any(reason in e.reason for e in events if isinstance(e, Failure))


def test_a_subject_of_version_1_is_told_why_nothing_was_compared(checkpoint: Path) -> None:
    subject = TorchSubject(checkpoint, "float32")
    assert path_capabilities(subject) == frozenset()
    events = events_of(checkpoint, subject)
    assert [(event.axis, event.item) for event in events if isinstance(event, Skip)] == [
        ("path", name) for name in NAMES
    ]
    assert len(events) == len(NAMES)


def test_methods_of_version_2_are_not_asked_of_version_1(relax: Any) -> None:
    subject = Wrapped(relax())
    assert path_capabilities(subject) == set(PATH_METHODS)
    subject.protocol = 1
    assert path_capabilities(subject) == frozenset()
    validate(subject, "test")
    subject.protocol = 3
    with pytest.raises(BadInput, match="expected 1 or 2, found 3"):
        validate(subject, "test")


def test_the_rows_differ_whatever_the_prompts() -> None:
    for ids in ([[7]], [[3, 3, 3]], [list(range(40)), [1] * 40]):
        rows = rows_of([Case("one", np.array(ids, np.int32))], 64, 97)
        assert rows.shape == (ROWS, LENGTH)
    assert len(np.unique(rows, axis=0)) == ROWS
    few = rows_of([Case("one", np.array([[1, 2, 3]], np.int32))], 5, 4)
    assert few.tolist() == [[1, 2, 3, 1, 2], [2, 1, 3, 2, 1], [3, 2, 1, 0, 3]]


def test_there_are_at_least_25_faults_of_these_paths() -> None:
    assert len([fault for fault in FAULTS.values() if not fault.equivalent]) >= 25
    assert all(fault.area == "decode" for fault in FAULTS.values())
    names = {check.name for check in CHECKS}
    real = [fault for fault in FAULTS.values() if not fault.equivalent]
    assert {fault.first_tap.removeprefix("paths.") for fault in real} <= names


@pytest.mark.parametrize("fault", [n for n, f in FAULTS.items() if f.equivalent])
def test_what_softmax_cannot_see_is_let_pass(fault: str, checkpoint: Path, relax: Any) -> None:
    rows = judged(events_of(checkpoint, relax(fault=fault)))
    assert not [name for name, row in rows.items() if row.diverges]
