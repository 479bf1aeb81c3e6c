"""LayerNorm and RMSNorm in every variant, against the definition in higher precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reference.norm import norm
from reference.orders import GOLDEN, Norm, Order, Sum

UNIT = 2.0**-24
WIDTH = 200
VARIANTS = ["two_pass", "one_pass", "welford"]


def arguments(mean: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, WIDTH, generator=random) + mean
    weight = torch.randn(WIDTH, generator=random)
    return x, weight, torch.randn(WIDTH, generator=random)


def definition(x: Any, weight: Any, bias: Any, epsilon: float, rms: bool) -> np.ndarray:
    x, weight, bias = (t.numpy().astype(np.longdouble) for t in (x, weight, bias))
    if rms:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


@pytest.mark.parametrize("rms", [False, True])
def test_golden_is_the_definition(rms: bool) -> None:
    x, weight, bias = arguments()
    expected = definition(x, weight, bias, 1e-5, rms)
    found = norm(x.double(), weight, None if rms else bias, 1e-5, GOLDEN, rms=rms).numpy()
    assert np.abs(found - expected).max() <= limit(x, weight, bias, 2.0**-53, rms)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("plan", [Sum(), Sum("chunks", 16), Sum("tree", 8, "shuffled")], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("variance", VARIANTS)
def test_every_variant_keeps_the_derived_bound(
    variance: Any, affine: bool, plan: Sum, rms: bool
) -> None:
    x, weight, bias = arguments()
    expected = definition(x, weight, bias, 1e-5, rms)
    order = Order("any", sum=plan, norm=Norm(variance, affine=affine))
    found = norm(x, weight, None if rms else bias, 1e-5, order, rms=rms).double().numpy()
    assert np.abs(found - expected).max() <= limit(x, weight, bias, UNIT, rms)


def limit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, u: float, rms: bool) -> float:
    """Bound the error of a norm in precision `u`, to first order.

    A sum of n terms in any order errs by n u times the sum of absolutes. So the mean errs by
    (n + 1) u mean|x|, and each form of the variance by at most 2 (n + 4) u mean(x^2): one-pass
    takes the difference of two numbers of that size, the others sum smaller ones. Relative to the
    variance v this is halved by the square root. Five more roundings make the value.
    """
    wide, n = x.double(), x.shape[-1]
    variance = (wide**2).mean(-1) if rms else wide.var(-1, correction=0)
    deviation = variance.sqrt()
    mean_error = 0 if rms else (n + 1) * u * wide.abs().mean(-1) / deviation
    spread_error = (n + 4) * u * (wide**2).mean(-1) / variance
    largest = (wide.abs().amax(-1) + wide.abs().mean(-1)) / deviation
    value = (mean_error + largest * (spread_error + 5 * u)) * weight.abs().double().max()
    return float((value + 2 * u * bias.abs().double().max()).max())


@pytest.mark.parametrize("variance", VARIANTS)
def test_epsilon_matters(variance: Any) -> None:
    x, weight, bias = arguments()
    order = Order("any", norm=Norm(variance))
    small = x * 0.003
    with_epsilon = norm(small, weight, bias, 1e-5, order, rms=False)
    without = norm(small, weight, bias, 1e-12, order, rms=False)
    assert (with_epsilon - without).abs().max() > limit(small, weight, bias, UNIT, False)


def test_rounding_the_normalised_value_is_a_second_rounding() -> None:
    x, weight, bias = arguments()
    once = Order("once", storage="float16")
    twice = replace(once, norm=Norm(round_normalised=True))
    one = norm(x, weight, bias, 1e-5, once, rms=False)
    two = norm(x, weight, bias, 1e-5, twice, rms=False)
    assert not torch.equal(one, two)
    normalised = norm(x, torch.ones(WIDTH), None, 1e-5, once, rms=False)
    by_hand = ((normalised * weight).half().float() + bias).half().float()
    assert torch.equal(two, by_hand)


def test_one_pass_variance_never_makes_a_nan() -> None:
    x = torch.full((1, 1, WIDTH), 1000.1)
    order = Order("any", norm=Norm("one_pass"))
    assert torch.isfinite(norm(x, torch.ones(WIDTH), None, 1e-5, order, rms=False)).all()


@pytest.mark.parametrize("width", [1, 31, 32, 33])
def test_welford_merges_pieces_of_any_length(width: int) -> None:
    x = torch.arange(width, dtype=torch.float64).reshape(1, 1, -1)
    ones = torch.ones(width)
    order = replace(GOLDEN, norm=Norm("welford"))
    found = norm(x, ones, None, 1e-5, order, rms=False)
    expected = torch.nn.functional.layer_norm(x, (width,), eps=1e-5)
    # Few terms below 33: their sums of squares are exact but for 1/n; some roundings of numbers
    # below 2 are left.
    assert (found - expected).abs().max() <= 32 * 2.0**-53


def test_one_channel_is_its_own_mean_except_in_the_affine_form() -> None:
    """x r - mean r keeps the rounding of mean r, less than half a unit in its last place."""
    x = torch.tensor([[0.3], [-1.7], [200.0]])
    one, none = torch.ones(1), torch.zeros(1)
    centred = norm(x, one, none, 1e-5, Order("centred"), rms=False)
    affine = norm(x, one, none, 1e-5, Order("affine", norm=Norm(affine=True)), rms=False)
    assert (centred == 0).all()
    assert (affine != 0).any()
    assert (affine.abs() <= UNIT * (x * 1e-5**-0.5).abs() * (1 + 4 * UNIT)).all()
