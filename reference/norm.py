"""LayerNorm and RMSNorm, with the ways in which kernels sum and round them."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.arithmetic import rounded, sum_last
from reference.orders import Order

PIECE = 32


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, order: Order, *, rms: bool
) -> Tensor:
    """Normalise the last axis.

    ``(x - mean) / sqrt(biased variance + epsilon) * weight (+ bias)``, or for RMSNorm
    ``x / sqrt(mean of squares + epsilon) * weight``.

    Parameters
    ----------
    x
        (..., width) in the compute type.
    weight, bias
        (width,), in any type.

    Returns
    -------
    Tensor
        As `x`, rounded to storage.
    """
    mean, variance = _rms(x, order) if rms else _layer(x, order)
    value = _normalised(x, mean, torch.rsqrt(variance + epsilon), order)
    if order.norm.round_normalised:
        value = rounded(value, order)
    value = value * weight.to(x.dtype)
    if bias is not None:
        if order.norm.round_normalised:
            value = rounded(value, order)
        value = value + bias.to(x.dtype)
    return rounded(value, order)


def _normalised(x: Tensor, mean: Tensor | None, rate: Tensor, order: Order) -> Tensor:
    if mean is None:
        return x * rate
    if order.norm.affine:
        # A fused multiply-add: the product is exact, the sum is rounded once.
        shift = -(mean * rate)
        return (x.double() * rate.double() + shift.double()).to(x.dtype)
    return (x - mean) * rate


def _rms(x: Tensor, order: Order) -> tuple[None, Tensor]:
    return None, sum_last(x * x, order) / x.shape[-1]


def _layer(x: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance."""
    width = x.shape[-1]
    if order.norm.variance == "welford":
        return _welford(x)
    mean = sum_last(x, order) / width
    if order.norm.variance == "two_pass":
        centred = x - mean
        return mean, sum_last(centred * centred, order) / width
    # Cancels if the mean is large against the spread; a negative difference is rounding.
    variance = sum_last(x * x, order) / width - mean * mean
    return mean, variance.clamp(min=0)


def _welford(x: Tensor) -> tuple[Tensor, Tensor]:
    """Merge mean and sum of squares of pieces (Chan, Golub and LeVeque 1983)."""
    mean = x[..., :1] * 0
    squares = mean
    seen = 0
    for piece in x.split(PIECE, dim=-1):
        count = piece.shape[-1]
        piece_mean = piece.mean(dim=-1, keepdim=True)
        difference = piece_mean - mean
        squares = squares + ((piece - piece_mean) ** 2).sum(dim=-1, keepdim=True)
        squares = squares + difference**2 * (seen * count / (seen + count))
        mean = mean + difference * (count / (seen + count))
        seen += count
    return mean, squares / seen
