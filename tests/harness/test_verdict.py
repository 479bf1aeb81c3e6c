"""One verdict from rows, failures and coverage: a gap is never green."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.judge.coverage import Axis, Omission
from harness.judge.verdict import Row, is_golden_itself, outcome
from harness.measure.records import Failure, Measurement
from harness.measure.statistics import STATISTICS, Statistics
from harness.measure.taps import Place

FULL = Axis("taps", 3, 3)
GAP = Axis("taps", 3, 2)
FAILED = Failure(Place(0, "output"), "p", "raised", "")


def same(value: float) -> Statistics:
    return Statistics(**dict.fromkeys(STATISTICS, value), worst_row=0)


def row(ratio: float = 0.5, *, observed: float = 1.0, order: float = 1.0, **fields: object) -> Row:
    measurement = Measurement(
        mode="local",
        place=Place(0, "norm_1"),
        prompt="p",
        rows=2,
        columns=2,
        exact=False,
        observed=same(observed),
        orders=(same(order),),
        relative=0.0,
        returned="float16",
        length=2,
    )
    return Row(replace(measurement, **fields), "rms", 0.0, 0.0, ratio)  # type: ignore[arg-type]


@settings(derandomize=True)
@given(
    ratios=st.lists(st.floats(0, 2), max_size=4),
    failures=st.integers(0, 1),
    broken=st.integers(0, 2),
    axes=st.lists(st.sampled_from([FULL, GAP]), max_size=3),
)
def test_conforms_only_if_nothing_speaks_against_it(
    ratios: list[float], failures: int, broken: int, axes: list[Axis]
) -> None:
    verdict = outcome([row(r) for r in ratios], [FAILED] * failures, broken, axes)
    wrong = any(ratio > 1 for ratio in ratios) or failures > 0 or broken > 0
    if wrong:
        assert verdict == "diverges"
    elif not ratios or GAP in axes:
        assert verdict == "not-proven"
    else:
        assert verdict == "conforms"


@pytest.mark.parametrize("ratio", [math.nan, math.inf, math.nextafter(1, 2)])
def test_a_ratio_that_is_not_at_most_one_diverges(ratio: float) -> None:
    assert row(ratio).diverges
    assert outcome([row(), row(ratio)], [], 0, [FULL]) == "diverges"


def test_a_divergence_outweighs_a_gap() -> None:
    assert outcome([row(2)], [], 0, [GAP]) == "diverges"


def test_nothing_compared_is_not_proven() -> None:
    assert outcome([], [], 0, [FULL]) == "not-proven"
    assert outcome([row()], [], 0, [Axis("taps", 0, 0)]) == "not-proven"


@settings(derandomize=True)
@given(expected=st.integers(0, 5), compared=st.integers(0, 6), left_out=st.lists(st.integers(0, 3)))
def test_an_axis_is_complete_if_every_item_is_accounted_for(
    expected: int, compared: int, left_out: list[int]
) -> None:
    made = Axis("taps", expected, compared, tuple(Omission(n, "why") for n in left_out))
    assert made.complete == (expected > 0 and compared + sum(left_out) == expected)
    assert made.full == (expected > 0 and compared == expected)


@pytest.mark.parametrize(
    ("mode", "observed"), list(product(("local", "free-running", "deployed"), (0.0, 1e-300)))
)
def test_no_rounding_error_at_all_is_the_golden_itself(mode: str, observed: float) -> None:
    rows = [row(observed=0.0), row(observed=observed, mode=mode)]
    assert is_golden_itself(rows) == (observed == 0)


def test_where_nothing_rounds_an_exact_result_says_nothing() -> None:
    silent = [
        row(observed=0.0, exact=True),
        row(observed=0.0, order=0.0),
        row(observed=0.0, mode="deployed", place=Place(None, "forward-chain")),
    ]
    assert not is_golden_itself(silent)
    assert not is_golden_itself([])
