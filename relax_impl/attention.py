"""Causal attention with ALiBi, assembled from small replaceable pieces.

The pieces (`bias`, `visible`, `score`) are expressions. They are used by the portable lowering
below and, sixteen keys at a time, by the kernels, so they must not assume scalar operands: write
constants as Python numbers and casts with `cast`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from relax_impl.config import MPTConfig

Expr = Any
MASKED = float(np.finfo(np.float32).min)
"""Score of an invisible key: finite, so that a row without visible keys is uniform, not NaN."""


def cast(value: Expr, dtype: str) -> Expr:
    """Convert an expression to `dtype`, keeping its lanes."""
    lanes = value.ty.dtype.lanes
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def alibi_bias(slope: Expr, distance: Expr) -> Expr:
    """Bias of a key at `distance` = key - query (never positive for visible keys), in float32."""
    return slope * distance


def causal(query: Expr, key: Expr) -> Expr:
    """Whether the query may look at the key: positions, int32."""
    return key <= query


def softmax_scale(config: MPTConfig) -> float:
    """What q.k is multiplied by."""
    return config.scale


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of the last sq positions over sk keys, q (b, sq, H, D), k and v (b, sk, kvH, D).

    Scores, softmax and both sums are float32 whatever the storage dtype; probabilities are not
    rounded; the context is rounded once. q is scaled before q.k, in float32.

    Parameters
    ----------
    bias
        Added to a score, from slope and distance (float32); not asked without ALiBi.
    visible
        Mask; None shows every key. Invisible scores are `MASKED`.
    scale
        Factor of q.k.
    score
        Applied to the finished score before the mask.
    probability
        Applied to each softmax numerator (portable: probability) before it weighs a value.
    lowering
        Emits the computation: `portable`, or a kernel.
    """

    bias: Callable[[Expr, Expr], Expr] = alibi_bias
    visible: Callable[[Expr, Expr], Expr] | None = causal
    scale: Callable[[MPTConfig], float] = softmax_scale
    score: Callable[[Expr], Expr] | None = None
    probability: Callable[[Expr], Expr] | None = None
    lowering: Callable[[Attention, Tensor, Tensor, Tensor, Tensor, MPTConfig], Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, config: MPTConfig
    ) -> Tensor:
        """Emit the attention; returns the context, (b, sq, H, D) in q's dtype."""
        return (self.lowering or portable)(self, q, k, v, slopes, config)


def portable(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, config: MPTConfig
) -> Tensor:
    """Lower attention to operators that any target can schedule; scores exist as one tensor."""
    b, sq, heads, dim = q.shape
    _, sk, kv_heads, _ = k.shape
    group = heads // kv_heads
    scale = attention.scale(config)

    # Elements of a tensor become expressions here: the pieces ask operands for their dtype.
    def score(qk: Any, slopes: Any) -> Any:
        def element(b: Any, h: Any, g: Any, i: Any, j: Any) -> Any:
            query = (i + qk.shape[4] - qk.shape[3]).astype("int32")
            key = j.astype("int32")
            value = tirx.convert(qk[b, h, g, i, j])
            if config.alibi:
                slope = tirx.convert(slopes[h * group + g])
                value = value + attention.bias(slope, (key - query).astype("float32"))
            if attention.score is not None:
                value = attention.score(value)
            if attention.visible is not None:
                masked = tirx.const(MASKED, "float32")
                value = tirx.Select(attention.visible(query, key), value, masked)
            return value

        return te.compute(qk.shape, element, name="score")

    # (b, kvH, group, s, D): query heads of one group share a key head without copying it.
    def by_group(x: Tensor, length: Any, group: int) -> Tensor:
        return op.permute_dims(
            op.reshape(op.astype(x, "float32"), (b, length, kv_heads, group, dim)), [0, 2, 3, 1, 4]
        )

    qk = op.matmul(
        by_group(q, sq, group) * scale, op.permute_dims(by_group(k, sk, 1), [0, 1, 2, 4, 3])
    )
    p = op.softmax(op.tensor_expr_op(score, "score", [qk, slopes]), axis=-1)
    if attention.probability is not None:
        piece = attention.probability
        p = op.tensor_expr_op(
            lambda p: te.compute(p.shape, lambda *at: piece(tirx.convert(p[at]))), "round", [p]
        )
    context = op.matmul(p, by_group(v, sk, 1))
    context = op.permute_dims(context, [0, 3, 1, 2, 4])
    return op.astype(op.reshape(context, (b, sq, heads, dim)), q.dtype)
