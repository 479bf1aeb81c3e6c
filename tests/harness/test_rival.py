"""The published rules, each at both sides of its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.rival import RULES, verdicts

GOLDEN = np.array([[4.0, 3.0, 2.0, 1.0, 0.5, 0.25], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
REFERENCE = GOLDEN * (1 + 2.0**-11)


def passing(observed: np.ndarray) -> set[str]:
    return {name for name, passed in verdicts(observed, GOLDEN, REFERENCE).items() if passed}


def test_every_rule_passes_the_golden_itself() -> None:
    assert passing(GOLDEN) == set(RULES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_nothing(value: float) -> None:
    observed = GOLDEN.copy()
    observed[1, 2] = value
    assert passing(observed) == set()


def test_elementwise_rules_are_numpy_s_and_torch_s() -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for size in np.geomspace(1e-5, 2.0, 40):
        observed = GOLDEN + size * rng.uniform(-1, 1, GOLDEN.shape)
        found = verdicts(observed, GOLDEN, REFERENCE)
        assert found["allclose 1e-2/1e-3"] == np.allclose(observed, GOLDEN, 1e-2, 1e-3)
        assert found["allclose 1e-2/1.0"] == np.allclose(observed, GOLDEN, 1e-2, 1.0)
        close = True
        try:
            # The defaults of float16, on values that float16 would round.
            torch.testing.assert_close(
                torch.from_numpy(observed), torch.from_numpy(GOLDEN), rtol=1e-3, atol=1e-5
            )
        except AssertionError:
            close = False
        assert found["assert_close float16"] == close
        seen.add(tuple(found[n] for n in ("assert_close float16", "allclose 1e-2/1.0")))
    assert seen == {(True, True), (False, True), (False, False)}


def test_defaults_of_assert_close_are_those_of_torch() -> None:
    from torch.testing._comparison import default_tolerances

    assert default_tolerances(torch.float16) == (1e-3, 1e-5)


def test_top_five_forgives_rank_five_and_not_rank_six() -> None:
    ranked = GOLDEN.copy()
    ranked[0] = [1.0, 6.0, 5.0, 4.0, 3.0, 0.0]
    assert "top-5" in passing(ranked)
    ranked[0, 5] = 2.0
    assert "top-5" not in passing(ranked)


def test_twice_the_reference_is_a_bound_on_the_root_mean_square() -> None:
    error = REFERENCE - GOLDEN
    assert "float64 x 2" in passing(GOLDEN - 1.999 * error)
    assert "float64 x 2" not in passing(GOLDEN - 2.001 * error)


def test_cosine_and_normalised_error_are_blind_to_what_they_are_blind_to() -> None:
    assert "cosine >= 0.99" in passing(GOLDEN * 100)
    assert "NMSE < 1e-2" not in passing(GOLDEN * 100)
    assert "NMSE < 1e-2" in passing(GOLDEN * 1.099)
    assert "NMSE < 1e-2" not in passing(GOLDEN * 1.101)
    turned = GOLDEN.copy()
    turned[1, 5] = -turned[1, 5]
    assert "cosine >= 0.99" not in passing(turned)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match="one shape"):
        verdicts(GOLDEN[:1], GOLDEN, REFERENCE)
    with pytest.raises(ValueError, match="not empty"):
        verdicts(GOLDEN[:0], GOLDEN[:0], REFERENCE[:0])
