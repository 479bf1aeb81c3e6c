"""The alarm for slow drift: its false-alarm rate, and how soon it sees a creep."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.gate import drift
from harness.gate.drift import EVERY, alarms, evidence, mode_means


def test_a_bet_is_fair_whatever_the_rank():
    """Over all ranks a bet gains 1 at most: the right Riemann sum of a falling function."""
    for exponent in drift._EXPONENTS:
        for count in (1, 2, 3, 10, 100, 1000):
            ranks = np.arange(1, count + 1) / count
            assert np.mean(exponent * ranks ** (exponent - 1)) <= 1.0


def test_exchangeable_runs_raise_no_more_alarms_than_stated():
    """P(R >= A within n) <= n / A, for values of a heavy tail and with many ties alike."""
    rng = np.random.default_rng(0)
    runs, threshold, series = 40, 80.0, 600
    for draw in (lambda: rng.standard_cauchy(runs), lambda: rng.integers(0, 3, runs)):
        raised = sum(max(evidence([float(x) for x in draw()])) >= threshold for _ in range(series))
        assert raised / series <= runs / threshold


def test_a_healthy_cell_stays_quiet():
    rng = np.random.default_rng(1)
    for _ in range(20):
        series = {("local", str(k)): np.exp(rng.normal(0, 0.1, 60)).tolist() for k in range(40)}
        assert alarms(series, standing=False) == ()


def test_values_that_never_change_raise_nothing():
    assert alarms({("local", "a"): [0.5] * 500}, standing=False) == ()


def test_one_step_that_stays_is_no_drift():
    """A new compiler moves a value once; ranks fall back into line behind the step.

    After hundreds of runs that were all alike the step itself is news, for a while.
    """
    for before in (5, 30):
        assert alarms({("local", "a"): [0.5] * before + [0.52] * 300}, standing=False) == ()
    assert alarms({("local", "a"): [0.5] * 200 + [0.52] * 300}) == ()


@pytest.mark.parametrize(("share", "within"), [(1.0, 12), (0.25, 16)])
def test_a_tenth_a_run_is_seen_within_the_stated_number_of_runs(share, within):
    """After 30 healthy runs that scatter by 10 %, as docs/gate.md states it."""
    rng = np.random.default_rng(2)
    taps, healthy = 40, 30
    for _ in range(8):
        creeping = int(share * taps)
        series = {}
        for k in range(taps):
            values = np.exp(rng.normal(0, 0.1, healthy + within))
            if k < creeping:
                values[healthy:] *= 1.1 ** np.arange(1, within + 1)
            series["local", str(k)] = values.tolist()
        found = alarms(series)
        assert found and found[0].at >= healthy


def test_a_creep_that_was_put_right_fades():
    rng = np.random.default_rng(3)
    values = np.exp(rng.normal(0, 0.05, 400))
    values[30:50] *= 1.1 ** np.arange(1, 21)
    series = {("local", "a"): values.tolist()}
    assert alarms({("local", "a"): values[:50].tolist()})
    assert alarms(series) == () and alarms(series, standing=False)


def test_what_is_not_finite_is_the_largest_value():
    means = mode_means({("local", "a"): [0.5, math.inf], ("local", "b"): [0.5, 0.5]})
    assert means == {"local": [pytest.approx(0.5, rel=2**-50), math.inf]}
    assert evidence([1.0, 2.0, math.inf]) == evidence([1.0, 2.0, 3.0])


def test_the_threshold_grows_with_what_is_watched():
    assert drift.thresholds(100, 4, EVERY) == (200 * EVERY, 8 * EVERY)
