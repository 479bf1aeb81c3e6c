"""The original's own sequence of torch operations, in the storage type: what a native order runs.

Nothing here is grouped or rounded by us: torch's kernels decide. This is the bridge to code that
runs the original's operations, which it matches bit for bit, and not a base of limits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from reference.arithmetic import DTYPES
from reference.config import MPTConfig
from reference.orders import Order


def storage_dtype(order: Order) -> torch.dtype:
    """Return the type in which everything is held."""
    if order.storage is None:
        raise ValueError(f"order {order.name}: a native order needs a storage type")
    return DTYPES[order.storage]


def attend(config: MPTConfig, order: Order, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as the original does; shapes as `reference.attention.attend`."""
    dtype = storage_dtype(order)
    batch, queries = q.shape[:2]
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    keys = k.shape[2]
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * config.scale
    if config.alibi:
        scores = scores + _bias(config, keys).to(q.device)
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    scores = scores.masked_fill(future, torch.finfo(dtype).min)
    probabilities = torch.softmax(scores, dim=-1).to(dtype)
    context = torch.matmul(probabilities, v).permute(0, 2, 1, 3).contiguous()
    return context.view(batch, queries, -1).to(torch.float32)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, order: Order, *, rms: bool
) -> Tensor:
    """Normalise the last axis in the storage type, statistics in float32.

    torch's layer_norm takes them in float32 by itself. The original's rms_norm squares in whatever
    type comes in: in float16 that overflows at 256, so float32 is the only order called legitimate.
    """
    dtype = storage_dtype(order)
    x, weight = x.to(dtype), weight.to(dtype)
    if rms:
        wide = x.float()
        value = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()
        value = value.to(dtype)
    else:
        beta = None if bias is None else bias.to(dtype)
        value = functional.layer_norm(x, (x.shape[-1],), weight, beta, epsilon)
    return value.to(torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Apply ``x W^T (+ b)`` in the storage type."""
    dtype = storage_dtype(order)
    beta = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), beta).to(torch.float32)


def gelu(x: Tensor, order: Order) -> Tensor:
    """Apply the exact GELU in the storage type."""
    return functional.gelu(x.to(storage_dtype(order))).to(torch.float32)


def add(x: Tensor, y: Tensor, order: Order) -> Tensor:
    """Add in the storage type."""
    dtype = storage_dtype(order)
    return (x.to(dtype) + y.to(dtype)).to(torch.float32)


def times(x: Tensor, factor: float, order: Order) -> Tensor:
    """Multiply by a number in the storage type."""
    return (x.to(storage_dtype(order)) * factor).to(torch.float32)


def _bias(config: MPTConfig, keys: int) -> Tensor:
    """Build the float32 table (n_heads, 1, keys), its exponentials by torch's float32 `pow`.

    `reference.alibi` rounds the true rates instead; the two can differ in the last bit.
    """
    steps = 2 ** math.ceil(math.log2(config.n_heads))
    exponents = torch.arange(1, steps + 1, dtype=torch.float32) * (config.alibi_bias_max / steps)
    rates = 1.0 / torch.pow(2, exponents)
    if steps != config.n_heads:
        rates = torch.cat([rates[1::2], rates[0::2]])[: config.n_heads]
    return rates[:, None, None] * torch.arange(1 - keys, 1)
