"""Which divergence is the first one."""

from __future__ import annotations

from typing import Any

import pytest

from harness.judge.verdict import Row
from harness.localise import first_divergence
from harness.measure.records import Failure, Measurement
from harness.measure.statistics import STATISTICS, Statistics
from harness.measure.taps import Place

WTE, ALIBI, LOGITS = (Place(None, tap) for tap in ("transformer.wte", "alibi", "logits"))
ORDER = (WTE, ALIBI, *(Place(i, t) for i in (0, 1) for t in ("norm_1", "output")), LOGITS)


def row(place: Place, mode: Any = "local", ratio: float = 2.0, worst: int = 0, **more: Any) -> Row:
    statistics = Statistics(**dict.fromkeys(STATISTICS, 1.0), worst_row=worst)
    measurement = Measurement(
        mode, place, "p", 6, 4, False, statistics, (), 0.0, "float16", length=3, **more
    )
    return Row(measurement, "tail", 20.0, 10.0, ratio)


def first(*rows: Row, failures: tuple[Failure, ...] = ()) -> Any:
    return first_divergence(rows, failures, ORDER)


def test_nothing_wrong_is_no_divergence() -> None:
    assert first() is None
    assert first(row(WTE, ratio=1.0), row(LOGITS, ratio=0.0)) is None


def test_the_first_in_order_of_evaluation_whatever_comes_first() -> None:
    rows = [row(LOGITS), row(Place(1, "norm_1")), row(Place(0, "output"))]
    for turned in (rows, rows[::-1]):
        found = first(*turned)
        assert (found.tap, found.layer) == ("transformer.blocks.0.output", 0)


@pytest.mark.parametrize("mode", ["teacher-forced", "free-running", "deployed"])
def test_a_step_judged_alone_is_the_culprit_and_chains_are_witnesses(mode: str) -> None:
    found = first(row(Place(0, "norm_1"), mode), row(Place(1, "output"), "local"))
    assert (found.layer, found.mode) == (1, "local")


def test_a_block_from_the_golden_stream_is_nearer_than_one_from_the_tokens() -> None:
    found = first(
        row(Place(0, "norm_1"), "free-running"), row(Place(1, "output"), "teacher-forced")
    )
    assert found.mode == "teacher-forced"
    assert first(row(LOGITS, "deployed"), row(LOGITS, "free-running")).mode == "free-running"


def test_the_embedding_is_only_seen_running_free_and_comes_first_all_the_same() -> None:
    assert first(row(WTE, "free-running"), row(Place(0, "norm_1"))).tap == "transformer.wte"


def test_the_bias_enters_with_the_first_block() -> None:
    found = first(row(ALIBI, "alibi", worst=4), row(Place(0, "output")))
    assert (found.tap, found.layer, found.row) == ("alibi", 0, None)


def test_a_row_of_the_error_is_a_batch_row_and_a_token() -> None:
    found = first(row(Place(1, "output"), worst=5, head=2))
    assert (found.row, found.token, found.head) == (1, 2, 2)
    assert (found.statistic, found.observed, found.limit) == ("tail", 20.0, 10.0)


def test_a_failed_call_stands_where_it_was_made() -> None:
    failed = Failure(Place(0, "output"), "p", "block(0): raised", "")
    found = first(row(Place(1, "norm_1")), failures=(failed,))
    assert (found.layer, found.mode, found.reason) == (0, "call", "block(0): raised")
    assert found.observed is None
    assert first(row(Place(0, "norm_1")), failures=(failed,)).mode == "local"
    assert first(failures=(failed,)).mode == "call"
