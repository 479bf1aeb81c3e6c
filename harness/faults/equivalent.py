"""Mutations that change the code and not the model: none of them may be flagged.

Each carries its proof. Where the proof says "exactly", the result is the same to the last bit;
where it speaks of float32, it differs by roundings far below the storage dtype's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.core import wrap_nested

from harness.faults.mask import filled
from harness.faults.model import Area, Fault
from harness.faults.norm import normalised

Mutation = Callable[[Any], Any]


def _bias(change: Callable[[Any, Any], Any]) -> Mutation:
    return lambda ops: replace(ops, attention=replace(ops.attention, bias=change))


def _scaled_queries(ops: Any) -> Any:
    """Scale the queries in the storage dtype."""

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        inner = replace(ops.attention, scale=lambda config: 1.0)
        return inner(q * config.scale, k, v, slopes, config)

    return replace(ops, attention=attention)


def _heads_from_last(ops: Any) -> Any:
    """Work on the heads in reverse order, and put them back."""

    def flip(x: Any, axis: int) -> Any:
        return wrap_nested(relax.op.flip(x._expr, axis), "flip")

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        context = ops.attention(flip(q, 2), flip(k, 2), flip(v, 2), flip(slopes, 0), config)
        return flip(context, 2)

    return replace(ops, attention=attention)


def _large_bias(ops: Any) -> Any:
    """Hide keys by a bias of -1e30 instead of a mask."""
    attention = ops.attention

    def bias(slope: Any, distance: Any) -> Any:
        hidden = tirx.Select(distance > 0.0, filled(-1e30, distance), filled(0.0, distance))
        return attention.bias(slope, distance) + hidden

    return replace(ops, attention=replace(attention, bias=bias, visible=None))


def _max_then_min(x: Any, limit: float | None) -> Any:
    if limit is None:
        return x
    low, high = (relax.const(sign * limit, x.dtype) for sign in (-1, 1))
    return wrap_nested(relax.op.minimum(relax.op.maximum(x._expr, low), high), "clip")


def _half_first(x: Any) -> Any:
    """Apply GELU as (0.5 x) (1 + erf(x / sqrt 2))."""
    wide = op.astype(x, "float32")._expr
    inner = relax.op.erf(relax.op.multiply(wide, relax.const(0.5**0.5, "float32")))
    half = relax.op.multiply(wide, relax.const(0.5, "float32"))
    result = relax.op.multiply(half, relax.op.add(inner, relax.const(1.0, "float32")))
    return op.astype(wrap_nested(result, "gelu"), x.dtype)


def _two_halves(x: Any, linear: Any) -> Any:
    """Add two float32 products over half the columns each."""
    half = int(x.shape[-1]) // 2
    matrix = op.permute_dims(linear.matrix())
    wide = None
    for part, rows in zip(
        op.split(x, [half], axis=-1), op.split(matrix, [half], axis=0), strict=True
    ):
        product = op.matmul(part, rows, out_dtype="float32")
        wide = product if wide is None else wide + product
    if linear.bias is not None:
        wide = wide + op.astype(linear.bias, "float32")
    return op.astype(wide, x.dtype)


def _update_first(ops: Any) -> Any:
    return replace(ops, residual=lambda x, update: ops.residual(update, x))


def _scaled_hidden(ops: Any) -> Any:
    """Apply logit_scale to the hidden states."""

    def unembed(hidden: Any, table: Any, scale: float | None) -> Any:
        return ops.unembed(hidden if scale is None else hidden * scale, table, None)

    return replace(ops, unembed=unembed)


def _by_recurrence(ops: Any) -> Any:
    """Make the slopes of a power of two of heads by repeated multiplication."""

    def slopes(config: Any) -> Any:
        power = 1 << (config.n_heads - 1).bit_length()
        ratio = 2.0 ** -(config.alibi_bias_max / power)
        table = np.cumprod(np.full(power, ratio, np.float32))
        if power != config.n_heads:
            table = np.concatenate([table[1::2], table[0::2]])[: config.n_heads]
        return table.astype(np.float32) * np.float32(config.alibi)

    return replace(ops, slopes=slopes)


def _equivalent(
    name: str,
    area: Area,
    summary: str,
    operations: Mutation,
    proof: str,
    exposure: str = "trained",
) -> Fault:
    return Fault(
        name, area, "invented", exposure, "none", summary, operations, equivalent=True, proof=proof
    )


FAULTS: tuple[Fault, ...] = (
    _equivalent(
        "same-alibi-row-constant",
        "alibi",
        "a constant is added to every bias",
        _bias(lambda slope, distance: slope * distance + 3.0),
        "softmax(s + c) = exp(s + c) / sum exp(s + c) = softmax(s), as exp(c) cancels; adding 3 in "
        "float32 rounds scores of tens by less than 1e-5.",
    ),
    _equivalent(
        "same-alibi-anchor",
        "alibi",
        "distances are counted from 256 keys after the query",
        _bias(lambda slope, distance: slope * (distance - 256.0)),
        "slope * (d - 256) = slope * d - 256 * slope, and the last term is the same for every key "
        "of a head: a row constant, which the softmax cancels. Integers below 2^24 are exact, and "
        "float32 rounds biases below 512 by less than 2^-15, no more than a table of 512 positions "
        "does that is made once and cut from the left.",
    ),
    _equivalent(
        "same-alibi-absolute",
        "alibi",
        "the bias is -slope * |i - j|",
        _bias(lambda slope, distance: -(slope * tirx.abs(distance))),
        "Visible keys have j <= i, hence |i - j| = i - j and the bias is exactly slope * (j - i); "
        "keys with j > i are masked whatever their bias.",
    ),
    _equivalent(
        "same-slopes-by-recurrence",
        "alibi",
        "slopes are made by repeated multiplication in float32",
        _by_recurrence,
        "2^(-i m / N) = (2^(-m / N))^i; 16 multiplications in float32 err by less than 17 * 2^-24, "
        "1e-6 of a slope, and by 5e-4 of a score at 512 keys of the steepest head's slope, whose "
        "probability there is below exp(-300).",
    ),
    _equivalent(
        "same-scale-in-query",
        "config",
        "queries are scaled in the storage dtype by a power of two",
        _scaled_queries,
        "head_dim is 16, so the scale is 1/4; a product with a power of two is exact unless it "
        "becomes subnormal, where float16 loses at most 2^-25 of a query.",
    ),
    _equivalent(
        "same-heads-in-any-order",
        "mask",
        "heads are computed from the last to the first and put back",
        _heads_from_last,
        "Heads do not see each other; queries, keys, values and slopes are permuted alike and the "
        "contexts by the inverse, so every head is computed from exactly the same numbers.",
    ),
    _equivalent(
        "same-mask-by-bias",
        "mask",
        "keys are hidden by a bias of -1e30",
        _large_bias,
        "exp(-1e30 - max) is exactly 0 in float32 for any max above -1e30, as for the smallest "
        "finite score; and every query sees its own key, so that max is moderate.",
    ),
    _equivalent(
        "same-clip-by-min-max",
        "config",
        "clipping is a maximum and then a minimum",
        lambda ops: replace(ops, clip=_max_then_min),
        "min(max(x, -c), c) is the definition of clamp for -c <= c; exactly the same values.",
        "clip",
    ),
    _equivalent(
        "same-gelu-half-first",
        "activation",
        "GELU is (x / 2) (1 + erf(x / sqrt 2))",
        lambda ops: replace(ops, activation=_half_first),
        "A reassociation of the same product: halving is exact, and float32 evaluates it with an "
        "error of a few 2^-24, a rounding to float16 away from notice.",
    ),
    _equivalent(
        "same-norm-by-division",
        "norm",
        "norms divide by the root instead of multiplying by the inverse root",
        lambda ops: replace(ops, norm=normalised),
        "x / sqrt(v) = x * rsqrt(v); in float32 both err by a few 2^-24 before the only rounding.",
    ),
    _equivalent(
        "same-linear-two-halves",
        "precision",
        "matrix products are added from two halves in float32",
        lambda ops: replace(ops, linear=_two_halves),
        "Addition is associative; both groupings accumulate in float32 and round once.",
    ),
    _equivalent(
        "same-residual-commuted",
        "residual",
        "the stream is added to the update",
        _update_first,
        "IEEE addition is commutative: exactly the same values.",
    ),
    _equivalent(
        "same-logit-scale-in-hidden",
        "tokens",
        "logit_scale, a power of two, is applied to the hidden states",
        _scaled_hidden,
        "The product is linear, and 1/8 times a float16 is exact unless it becomes subnormal: "
        "below 2^-14 at most 2^-25 is lost of a hidden state of order 1.",
        "logit-scale",
    ),
)
