"""The matched filter on errors made up by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.diagnose.match import Scene, Template, bound, match

SHAPE = (24, 40)
RNG = np.random.default_rng(0)
GOLDEN = RNG.normal(size=SHAPE)
NOISE = np.full(SHAPE, 1e-3)
ORDERS = tuple(GOLDEN + NOISE * RNG.uniform(-1.7, 1.7, SHAPE) for _ in range(5))
TEMPLATES = {name: GOLDEN + RNG.normal(size=SHAPE) * size for name, size in
             {"large": 1.0, "small": 0.02, "other": 0.3}.items()}  # fmt: skip


def ratio(observed: np.ndarray, expected: np.ndarray) -> float:
    """Conform within twice the noise, as a root mean square."""
    return float(np.sqrt(np.square((observed - expected) / NOISE).mean())) / 2.0


def scene(observed: np.ndarray) -> Scene:
    return Scene(observed, GOLDEN, ORDERS, lambda expected: NOISE, ratio, 1.5, 1e-6)


def rounding(seed: int) -> np.ndarray:
    return NOISE * np.random.default_rng(seed).uniform(-1.7, 1.7, SHAPE)


def templates(**more: np.ndarray) -> list[Template]:
    return [Template(name, expected) for name, expected in (TEMPLATES | more).items()]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(5))
def test_a_fault_is_named_with_coefficient_one(name: str, seed: int) -> None:
    group, nearest = match(scene(TEMPLATES[name] + rounding(seed)), templates())
    (found,) = group
    assert nearest == found
    assert found.fault == name
    assert abs(found.coefficient - 1.0) <= found.uncertainty
    assert found.explained > 0.99


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_none_of_these(seed: int) -> None:
    assert match(scene(GOLDEN + rounding(seed)), templates())[0] == ()


@given(st.floats(-3.0, 3.0).filter(lambda c: abs(c - 1.0) > 0.05))
def test_another_strength_is_none_of_these_but_the_nearest(strength: float) -> None:
    observed = GOLDEN + strength * (TEMPLATES["large"] - GOLDEN) + rounding(1)
    group, nearest = match(scene(observed), templates())
    assert group == ()
    if abs(strength) > 0.05:
        assert nearest is not None
        assert nearest.fault == "large"
        assert nearest.coefficient == pytest.approx(strength, abs=0.01)


def test_an_unknown_fault_is_none_of_these() -> None:
    observed = GOLDEN + np.random.default_rng(9).normal(size=SHAPE) + rounding(1)
    group, nearest = match(scene(observed), templates())
    assert group == ()
    assert nearest is not None
    assert nearest.explained < 0.05


def test_a_fault_and_something_else_is_none_of_these() -> None:
    extra = np.random.default_rng(9).normal(size=SHAPE) * 0.1
    group, nearest = match(scene(TEMPLATES["large"] + extra), templates())
    assert group == ()
    assert nearest is not None
    assert nearest.fault == "large"
    assert 0.9 < nearest.explained < 1.0


def test_what_cannot_be_told_apart_is_a_group() -> None:
    twin = TEMPLATES["large"] + NOISE * 1e-3
    group, _ = match(scene(TEMPLATES["large"] + rounding(2)), templates(twin=twin))
    assert {found.fault for found in group} == {"large", "twin"}


def test_what_fits_worse_is_told_apart() -> None:
    # Within the limits of a healthy implementation, but far beyond chance over so many elements.
    near = TEMPLATES["large"] + NOISE * RNG.choice([-1.0, 1.0], SHAPE)
    group, _ = match(scene(TEMPLATES["large"] + rounding(3)), templates(near=near))
    assert [found.fault for found in group] == ["large"]


def test_a_template_below_the_noise_says_nothing() -> None:
    faint = GOLDEN + NOISE * 0.05
    group, _ = match(scene(faint + rounding(4)), templates(faint=faint))
    assert group == ()


def test_a_fault_that_leaves_the_range_is_matched_where_it_does_not() -> None:
    beyond = TEMPLATES["large"].copy()
    beyond[3, 5] = np.inf
    observed = beyond + rounding(5)
    observed[3, 5] = np.nan
    group, _ = match(scene(observed), templates(beyond=beyond))
    assert [found.fault for found in group] == ["beyond"]


def test_no_template_at_all() -> None:
    assert match(scene(TEMPLATES["large"]), []) == ((), None)
    assert match(scene(TEMPLATES["large"]), [Template("nothing", GOLDEN)]) == ((), None)


def test_more_templates_demand_more() -> None:
    assert bound([], 1000, 1.0, 1e-3) > bound([], 1, 1.0, 1e-3) == pytest.approx(3.2905, abs=1e-4)
    assert bound([0.5, -9.0], 1, 2.0, 1e-3) == 18.0
