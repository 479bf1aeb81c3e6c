"""Rounding points, and sums whose grouping is chosen: the ground the orders stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from reference.orders import Order, Sum

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ROWS_AT_A_TIME = 2048
WIDENED_AT_A_TIME = 2**20
"""Elements of a matrix: a copy of them stays in the cache between widening and multiplying."""
ON_A_DEVICE_AT_A_TIME = 2**26
"""Elements of a matrix where sums are in pieces: half a GiB in float64."""
CUT_TERMS = 16
"""Products that a matrix unit adds at once: the k of ``wgmma.m64nNk16``, for 16-bit operands."""
_FLOAT32_BITS = -(1 << (52 - 23))
"""Mask of the bits that float32 keeps of a float64: sign, exponent and 23 of the fraction."""


def compute_dtype(order: Order) -> torch.dtype:
    """Return the torch type of everything between two rounding points."""
    return DTYPES[order.compute]


def rounded(value: Tensor, order: Order) -> Tensor:
    """Round to the storage type and widen again; overflow becomes infinite, as in a tensor."""
    if order.storage is None:
        return value
    return value.to(DTYPES[order.storage]).to(value.dtype)


def product(a: Tensor, b: Tensor, order: Order) -> Tensor:
    """Multiply matrices with the grouping and the accumulator of an order.

    Parameters
    ----------
    a, b
        (..., n, k) and (..., k, m), in the compute type.
    order
        Only `sum`, `accumulator` and `step` matter; the result is not rounded to storage.

    Returns
    -------
    Tensor
        (..., n, m) in the compute type.
    """
    if order.accumulator == "float32":
        return _grouped(a, b, order.sum, torch.matmul, torch.add)
    if order.accumulator == "float32_cut":
        return _grouped(a, b, order.sum, _cut, torch.add)
    narrow = DTYPES[order.accumulator]

    def partial(x: Tensor, y: Tensor) -> Tensor:
        return _narrow(x, y, narrow, order.step)

    def plus(x: Tensor, y: Tensor) -> Tensor:
        return (x + y).to(narrow).to(x.dtype)

    return _grouped(a, b, order.sum, partial, plus)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Apply ``x W^T (+ b)``, unrounded except for what ``epilogue`` asks for.

    Parameters
    ----------
    x
        (..., k) in the compute type.
    weight, bias
        (m, k) and (m,), in any type; widened a few rows at a time, so that a float64 copy of a
        large matrix never exists.
    """
    rows = x.reshape(-1, x.shape[-1])
    pieces = []
    whole = order.sum.kind == "whole" and order.accumulator == "float32"
    height = ROWS_AT_A_TIME
    if weight.dtype != x.dtype:
        height = max(1, min(height, WIDENED_AT_A_TIME // weight.shape[1]))
    elif whole:
        height = weight.shape[0]
    elif x.device.type != "cpu":
        # There every piece of a sum is a call or two, and calls are what takes the time.
        height = max(1, ON_A_DEVICE_AT_A_TIME // weight.shape[1])
    for start in range(0, weight.shape[0], height):
        block = weight[start : start + height].to(x.dtype)
        pieces.append(product(rows, block.T, order))
    result = torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
    if bias is not None:
        if order.epilogue == "separate":
            result = rounded(result, order)
        result = result + bias.to(x.dtype)
    return result.reshape(*x.shape[:-1], weight.shape[0])


def sum_last(x: Tensor, order: Order) -> Tensor:
    """Sum the last axis, kept as 1, in the grouping of an order; reductions are never narrow."""
    if order.sum.kind == "whole":
        return x.sum(dim=-1, keepdim=True)
    ones = torch.ones(x.shape[-1], 1, dtype=x.dtype, device=x.device)
    return _grouped(x, ones, order.sum, torch.matmul, torch.add)


def gelu(x: Tensor, order: Order) -> Tensor:
    """Apply the exact (erf) GELU, unrounded."""
    half = 0.5**0.5
    if x.dtype == torch.float64:
        # erfc keeps the relative precision of the left tail, where 1 + erf cancels.
        return 0.5 * x * torch.erfc(-half * x)
    if order.gelu == "half_first":
        return (0.5 * x) * (1 + torch.erf(half * x))
    if order.gelu == "half_last":
        return x * (0.5 + 0.5 * torch.erf(half * x))
    if order.gelu == "storage" and order.storage is not None and order.activation == "storage":
        return functional.gelu(x.to(DTYPES[order.storage])).to(x.dtype)
    return functional.gelu(x)


def _narrow(a: Tensor, b: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Sum in a narrow accumulator: every `step` terms exactly, then rounded; the total likewise.

    With ``step=1`` this is a loop of separate multiplications and additions in `dtype`.
    """
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=dtype, device=a.device)
    a, b = a.transpose(-1, -2).contiguous().transpose(-1, -2), b.contiguous()
    for start in range(0, a.shape[-1], step):
        x, y = a[..., start : start + step], b[..., start : start + step, :]
        part = x * y if step == 1 else torch.matmul(x, y)
        # torch adds two half-precision numbers in float32 and rounds once.
        total += part.to(dtype)
    return total.to(a.dtype)


def _cut(a: Tensor, b: Tensor) -> Tensor:
    """Sum as a matrix unit does that cuts: `CUT_TERMS` products and the total, then towards zero.

    The unit itself also cuts each addend 25 places below the largest exponent among them, see
    ``benchmarks/gpu_accumulator.py``. That takes a pass for every term to imitate, and is left out:
    what is lost then is a half of a unit of the last place each time, where it is three eighths.
    Numbers below the normal ones of float32 keep all of their bits.
    """
    left, right = a.double(), b.double()
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float64, device=a.device)
    bits = total.view(torch.int64)
    for start in range(0, a.shape[-1], CUT_TERMS):
        x, y = left[..., start : start + CUT_TERMS], right[..., start : start + CUT_TERMS, :]
        if total.dim() == 2:
            total.addmm_(x, y)
        else:
            total += torch.matmul(x, y)
        bits.bitwise_and_(_FLOAT32_BITS)
    return total.to(a.dtype)


def _grouped(
    a: Tensor,
    b: Tensor,
    plan: Sum,
    partial: Callable[[Tensor, Tensor], Tensor],
    plus: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    length = a.shape[-1]
    if length > 1 and (plan.permutation != "none" or plan.kind == "lanes"):
        visit = _visit(length, plan).to(a.device)
        # Weights come as a transposed view: picking along their last axis in memory is faster.
        a, b = a.index_select(-1, visit), b.transpose(-1, -2).index_select(-1, visit)
        b = b.transpose(-1, -2)
    if plan.kind == "whole" or length <= 1:
        return partial(a, b)
    if plan.kind == "lanes":
        counts = [len(range(i, length, plan.size)) for i in range(min(plan.size, length))]
        pieces = zip(a.split(counts, dim=-1), b.split(counts, dim=-2), strict=True)
        return _pairwise([partial(x, y) for x, y in pieces], plus)
    if plan.kind == "tree":
        return _tree(a, b, plan.size, partial, plus)
    width = -(-length // plan.size) if plan.kind == "split" else plan.size
    parts_in_turn = _pieces(a, b, width)
    total = partial(*next(parts_in_turn))
    for piece in parts_in_turn:
        total = plus(total, partial(*piece))
    return total


def _visit(length: int, plan: Sum) -> Tensor:
    visit = torch.arange(length)
    if plan.permutation == "reversed":
        visit = visit.flip(0)
    elif plan.permutation == "halves":
        visit = visit.roll(length // 2)
    elif plan.permutation == "shuffled":
        visit = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    if plan.kind == "lanes":
        visit = torch.cat([visit[i :: plan.size] for i in range(min(plan.size, length))])
    return visit


def _pieces(a: Tensor, b: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, a.shape[-1], width):
        yield a[..., start : start + width], b[..., start : start + width, :]


def _tree(
    a: Tensor,
    b: Tensor,
    leaf: int,
    partial: Callable[[Tensor, Tensor], Tensor],
    plus: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    length = a.shape[-1]
    if length <= leaf:
        return partial(a, b)
    middle = length // 2
    left = _tree(a[..., :middle], b[..., :middle, :], leaf, partial, plus)
    right = _tree(a[..., middle:], b[..., middle:, :], leaf, partial, plus)
    return plus(left, right)


def _pairwise(parts: list[Tensor], plus: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    while len(parts) > 1:
        odd = [parts[-1]] if len(parts) % 2 else []
        pairs = zip(parts[0::2], parts[1::2], strict=False)
        parts = [plus(x, y) for x, y in pairs] + odd
    return parts[0]
