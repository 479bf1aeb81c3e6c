"""From orders to limits, and from limits to a judged row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.calibrate import MODES
from harness.errors import ConformanceError
from harness.judge.factors import Factors, shipped
from harness.judge.limits import floor, limits, scarcity, usable
from harness.judge.verdict import judge
from harness.measure.records import Measurement
from harness.measure.statistics import STATISTICS, Shares, Statistics, statistics
from harness.measure.taps import Place
from harness.subjects.protocol import STORAGE_DTYPES


def same(value: float, **others: float) -> Statistics:
    return Statistics(**(dict.fromkeys(STATISTICS, value) | others), worst_row=0)


def measured(observed: Statistics, *orders: Statistics, **fields: object) -> Measurement:
    made = Measurement(
        mode="local",
        place=Place(0, "norm_1"),
        prompt="p",
        rows=8,
        columns=16,
        exact=False,
        observed=observed,
        orders=orders,
        relative=0.0,
        returned="float16",
        length=8,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


FACTOR = 3.0
TABLE = Factors(
    1e-6,
    {m: {d: dict.fromkeys(STATISTICS, FACTOR) for d in STORAGE_DTYPES} for m in MODES},
    {},
)

shapes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@settings(derandomize=True)
@given(shape=shapes, alpha=st.floats(1e-12, 0.01))
def test_floors_lie_between_the_noise_and_its_largest_value(
    shape: tuple[int, int], alpha: float
) -> None:
    rows, columns = shape
    for name in ("rms", "row", "column"):
        assert 1 < floor(name, rows, columns, alpha) <= math.sqrt(3)
    assert floor("tail", rows, columns, alpha) == math.sqrt(3)
    for name, length in (("row_bias", columns), ("column_bias", rows), ("gain", rows * columns)):
        assert 0 < floor(name, rows, columns, alpha) <= math.sqrt(3) * math.sqrt(length)


@settings(derandomize=True)
@given(shape=shapes, name=st.sampled_from(STATISTICS), share=st.floats(0, 1), more=st.floats(0, 1))
def test_accumulation_only_raises_a_floor(
    shape: tuple[int, int], name: str, share: float, more: float
) -> None:
    low, high = sorted((share, more))
    floors = [floor(name, *shape, 1e-6, Shares(s, s, s, s)) for s in (0.0, low, high)]
    assert floors == sorted(floors)


@pytest.mark.parametrize(
    "name", ["tail", "rms", "row", "column", "row_bias", "column_bias", "gain"]
)
@pytest.mark.parametrize("shape", [(1, 384), (3, 40), (200, 5)])
def test_normal_errors_exceed_the_floor_as_rarely_as_was_said(
    name: str, shape: tuple[int, int]
) -> None:
    """Counted over many draws: alpha for rows and columns together, within six deviations."""
    alpha, trials = 0.01, 4000
    draws = np.random.default_rng(shape[1]).standard_normal((trials, *shape))
    golden = np.random.default_rng(1).standard_normal(shape)
    one = np.ones(shape)
    limit = floor(name, *shape, alpha, Shares(1, 1, 1, 1))
    exceeded = np.mean([statistics(golden + d, golden, one).get(name) > limit for d in draws])
    assert exceeded <= alpha + 6 * math.sqrt(alpha / trials)


@settings(derandomize=True)
@given(shape=shapes, alpha=st.floats(1e-12, 0.01))
def test_rows_and_columns_are_treated_alike(shape: tuple[int, int], alpha: float) -> None:
    rows, columns = shape
    assert floor("row", rows, columns, alpha) == floor("column", columns, rows, alpha)
    assert floor("row_bias", rows, columns, alpha) == floor("column_bias", columns, rows, alpha)


@settings(derandomize=True)
@given(shape=shapes, name=st.sampled_from(STATISTICS), alpha=st.floats(1e-12, 0.01))
def test_a_rarer_alarm_needs_a_higher_floor(
    shape: tuple[int, int], name: str, alpha: float
) -> None:
    assert floor(name, *shape, alpha / 10) >= floor(name, *shape, alpha)


@settings(derandomize=True)
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=6))
def test_a_limit_is_the_factor_times_the_worst_order_or_the_floor(values: list[float]) -> None:
    found = limits(measured(same(1), *map(same, values)), "float16", TABLE)
    for name in STATISTICS:
        expected = max(max(values), floor(name, 8, 16, TABLE.alpha))
        assert found[name] == FACTOR * expected


def test_an_order_that_overflowed_makes_no_limit() -> None:
    kept = same(2.0)
    assert usable((same(math.inf), kept, same(math.nan))) == (kept,)
    found = limits(measured(same(1), same(math.inf), same(20.0)), "float16", TABLE)
    assert found["rms"] == FACTOR * 20


def test_an_exact_tap_allows_nothing() -> None:
    table = measured(same(0.0), same(5.0), exact=True)
    assert set(limits(table, "float16", TABLE).values()) == {0.0}
    assert not judge(table, "float16", TABLE).diverges
    row = judge(measured(same(0.0, tail=5e-324), same(5.0), exact=True), "float16", TABLE)
    assert (row.diverges, row.statistic, row.ratio) == (True, "tail", math.inf)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_worst_statistic_judges(name: str) -> None:
    limit = limits(measured(same(0), same(7.0)), "float16", TABLE)[name]
    inside = judge(measured(same(0.0, **{name: limit}), same(7.0)), "float16", TABLE)
    assert (inside.statistic, inside.ratio, inside.diverges) == (name, 1.0, False)
    beyond = math.nextafter(limit, math.inf)
    outside = judge(measured(same(0.0, **{name: beyond}), same(7.0)), "float16", TABLE)
    assert (outside.statistic, outside.observed, outside.limit) == (name, beyond, limit)
    assert outside.diverges


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_diverges(bad: float) -> None:
    for name in STATISTICS:
        assert judge(measured(same(0.0, **{name: bad}), same(1e9)), "float16", TABLE).diverges


def test_without_a_finite_order_nothing_can_be_called_right() -> None:
    row = judge(measured(same(0.0), same(math.inf)), "bfloat16", TABLE)
    assert row.diverges
    assert row.note == "every legitimate order overflows bfloat16 here"
    assert judge(measured(same(0.0)), "float16", TABLE).diverges


def test_an_overflow_of_the_golden_is_noted() -> None:
    row = judge(measured(same(0.0), same(1.0), overflow=3), "float16", TABLE)
    assert row.note == "3 golden values exceed the range of float16"


def test_what_was_not_calibrated_is_not_judged() -> None:
    with pytest.raises(ConformanceError, match=r"local/float16/rms.*mpt-conform calibrate"):
        judge(measured(same(0.0), same(1.0)), "float16", Factors(1e-6, {}, {}))


def test_the_shipped_factors_cover_everything_that_is_measured() -> None:
    table = shipped()
    assert 0 < table.alpha < 1
    for mode in MODES:
        for dtype in STORAGE_DTYPES:
            for name in STATISTICS:
                # Below 1 the legitimate order that made the limit would be flagged itself.
                assert 1 <= table.get(mode, dtype, name) < math.inf


@pytest.mark.parametrize("draws", [1, 2, 5, 12])
def test_few_draws_are_allowed_for_as_derived(draws: int) -> None:
    """The worst of n uniform draws, widened by the scarcity, is exceeded with probability alpha."""
    alpha, trials = 0.01, 200_000
    sample = np.random.default_rng(draws).random((trials, draws + 1))
    few = measured(same(1.0), *[same(1.0)] * draws, mode="free-running", rows=1)
    widened = scarcity(few, alpha) * sample[:, :draws].max(axis=1)
    exceeded = (sample[:, draws] > widened).mean()
    # Six standard deviations of a binomial share.
    assert abs(exceeded - alpha) <= 6 * math.sqrt(alpha * (1 - alpha) / trials)


def test_many_draws_and_local_roundings_are_not_widened() -> None:
    assert scarcity(measured(same(1.0), same(1.0), rows=1), 1e-6) == 1.0
    five = measured(same(1.0), *[same(1.0)] * 5, mode="deployed")
    wide = [scarcity(replace(five, rows=n), 1e-6) for n in (1, 20, 800)]
    assert wide == sorted(wide, reverse=True)
    # (n + 1) ** (-1 / n) alone is above 0.99 there, so that the rest is alpha's share.
    assert wide[2] <= 1e-6 ** (-1 / 4000)
