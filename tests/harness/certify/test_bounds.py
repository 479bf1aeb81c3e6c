"""The exact bound against its closed forms and its definition."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.certify.bounds import at_most, upper_bound


@pytest.mark.parametrize("trials", [1, 2, 17, 100, 3000])
def test_without_an_event_it_is_the_rule_of_three(trials: int) -> None:
    exact = 1.0 - 0.05 ** (1.0 / trials)
    assert upper_bound(0, trials) == pytest.approx(exact, rel=1e-12)
    assert upper_bound(0, trials) < 3.0 / trials


def test_published_values() -> None:
    # One-sided 95 %: e.g. 1 of 10 and 2 of 20 from tables of the binomial limits.
    assert upper_bound(1, 10) == pytest.approx(0.3942, abs=5e-5)
    assert upper_bound(2, 20) == pytest.approx(0.2826, abs=5e-5)


@given(st.integers(1, 60), st.data())
def test_at_the_bound_so_few_events_have_the_probability_left_over(
    trials: int, data: st.DataObject
) -> None:
    events = data.draw(st.integers(0, trials - 1))
    rate = upper_bound(events, trials)
    direct = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
    assert direct == pytest.approx(0.05, rel=1e-9)
    assert at_most(events, trials, rate) == pytest.approx(direct, rel=1e-9)


def test_more_events_or_fewer_trials_raise_it() -> None:
    assert upper_bound(1, 50) > upper_bound(0, 50) > upper_bound(0, 51)
    assert upper_bound(5, 5) == 1.0


@pytest.mark.parametrize(("events", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_nonsense_is_refused(events: int, trials: int) -> None:
    with pytest.raises(ValueError, match="events"):
        upper_bound(events, trials)
