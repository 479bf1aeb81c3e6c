"""The building blocks of the graph, each replaceable.

A model is built from an `Operations`; another kernel, another lowering or a planted fault is
``dataclasses.replace`` of one with another function in one field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.core import wrap_nested

from relax_impl import alibi
from relax_impl.attention import Attention
from relax_impl.cached import CachedAttention
from relax_impl.config import MPTConfig
from relax_impl.layout import ROWS, Layout

if TYPE_CHECKING:
    from relax_impl.model import MPTBlock, MPTEmbedding, MPTLinear, MPTNorm

OPAQUE = 8
"""TVM's operator pattern for what must not be fused."""

Tap = Callable[[str, Tensor], Tensor]
"""Called with the name and the value of every tap; returns the value to go on with."""


@dataclasses.dataclass(frozen=True)
class Operations:
    """Every computation of the graph, as functions over `nn.Tensor`.

    Hidden states are (b, s, features) in the storage dtype. Each function returns the storage
    dtype again except `unembed`, whose logits are float32.
    """

    slopes: Callable[[MPTConfig], NDArray[np.float32]]
    """ALiBi slopes, (n_heads,)."""
    embed: Callable[[Tensor, MPTEmbedding], Tensor]
    """Rows of a table for ids (b, s)."""
    positions: Callable[[Tensor, MPTEmbedding], Tensor]
    """Position rows for ids (b, s)."""
    positions_after: Callable[[Tensor, MPTEmbedding, Tensor, Tensor], Tensor]
    """The same where lengths (b,) slots lie before them, of which starts (b,) are padding."""
    mix: Callable[[Tensor, Tensor | None, float], Tensor]
    """Stream into block 0 from token rows, position rows (or None) and embedding_fraction."""
    norm: Callable[[Tensor, MPTNorm], Tensor]
    linear: Callable[[Tensor, MPTLinear], Tensor]
    clip: Callable[[Tensor, float | None], Tensor]
    split: Callable[[Tensor, MPTConfig], tuple[Tensor, Tensor, Tensor]]
    """Fused projection to query, key and value, heads still side by side."""
    split_heads: Callable[[Tensor, int], Tensor]
    """(b, s, heads * D) to (b, s, heads, D)."""
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, MPTConfig], Tensor]
    """Context (b, sq, H, D) of q (b, sq, H, D), k and v (b, sk, kvH, D), and slopes (H,)."""
    cached: CachedAttention
    """Attention with a past; takes bias, mask and scale from `attention`."""
    merge_heads: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]
    """Stream plus update."""
    unembed: Callable[[Tensor, MPTEmbedding, float | None], Tensor]
    """Logits of normalised hidden states, a table and logit_scale."""
    block: Callable[[Operations, MPTBlock, Tensor, Tap], Tensor]
    """The wiring of one block."""
    layout: Layout = ROWS
    """Storage order of all matrices; one for the whole model."""


def rounded(wide: Tensor, dtype: str) -> Tensor:
    """Round a float32 tensor to the storage dtype.

    A kernel into which both the rounding to bfloat16 and the next operator are fused would go on
    with the unrounded value, so for bfloat16 this is a kernel of its own.
    """
    if dtype != "bfloat16":
        return op.astype(wide, dtype)

    def emit(wide: Any) -> Any:
        return te.compute(wide.shape, lambda *at: wide[at].astype(dtype), name="rounded")

    return op.tensor_expr_op(emit, "rounded", [wide], attrs={"op_pattern": OPAQUE})


def embed(ids: Tensor, table: MPTEmbedding) -> Tensor:
    """Gather rows of the table."""
    layout, columns, dtype = table.layout, table.columns, table.weight.dtype

    def gather(ids: Any, weight: Any) -> Any:
        def element(b: Any, s: Any, k: Any) -> Any:
            return layout.element(weight, ids[b, s].astype("int64"), k)

        return te.compute((*ids.shape, columns), element, name="embed")

    rows = op.tensor_expr_op(gather, "embed", [ids, table.weight])
    assert rows.dtype == dtype
    return rows


def positions(ids: Tensor, table: MPTEmbedding) -> Tensor:
    """Gather the position rows 0..s-1 for every sequence."""
    layout, columns = table.layout, table.columns

    def gather(ids: Any, weight: Any) -> Any:
        return te.compute(
            (*ids.shape, columns),
            lambda b, s, k: layout.element(weight, s, k),
            name="positions",
        )

    return op.tensor_expr_op(gather, "positions", [ids, table.weight])


def positions_after(ids: Tensor, table: MPTEmbedding, lengths: Tensor, starts: Tensor) -> Tensor:
    """Gather position rows counted from the first slot that is no padding; padding gets row 0."""
    layout, columns = table.layout, table.columns

    def gather(ids: Any, weight: Any, lengths: Any, starts: Any) -> Any:
        def element(b: Any, s: Any, k: Any) -> Any:
            place = lengths[b].astype("int64") + s - starts[b].astype("int64")
            return layout.element(weight, tirx.max(place, tirx.const(0, "int64")), k)

        return te.compute((*ids.shape, columns), element, name="positions_after")

    arguments = [ids, table.weight, lengths, starts]
    return op.tensor_expr_op(gather, "positions_after", arguments)


def last(hidden: Tensor, index: Tensor) -> Tensor:
    """Pick one position of every sequence: (b, s, d) and (b,) to (b, 1, d)."""

    def gather(hidden: Any, index: Any) -> Any:
        return te.compute(
            (hidden.shape[0], 1, hidden.shape[2]),
            lambda b, _, d: hidden[b, index[b].astype("int64"), d],
            name="last",
        )

    return op.tensor_expr_op(gather, "last", [hidden, index])


def mix(token: Tensor, position: Tensor | None, fraction: float) -> Tensor:
    """Add position rows, and mix with the detached self as the original does.

    In inference ``f * x + (1 - f) * x`` is `x` up to rounding; it is computed in float32 and
    rounded once.
    """
    x = token if position is None else residual(token, position)
    if fraction == 1.0:
        return x
    wide = op.astype(x, "float32")
    return rounded(wide * fraction + wide * (1.0 - fraction), x.dtype)


def norm(x: Tensor, norm: MPTNorm) -> Tensor:
    """Layer norm or RMS norm over the last axis, in float32 with one rounding.

    The variance is taken around the mean in a second pass: E[x^2] - E[x]^2 cancels on streams with
    outliers.
    """
    wide = op.astype(x, "float32")._expr
    if not norm.is_rms:
        wide = relax.op.subtract(wide, relax.op.mean(wide, -1, keepdims=True))
    power = relax.op.mean(relax.op.multiply(wide, wide), -1, keepdims=True)
    scale = relax.op.rsqrt(relax.op.add(power, relax.const(norm.epsilon, "float32")))
    weight = op.astype(norm.weight, "float32")._expr
    wide = relax.op.multiply(relax.op.multiply(wide, scale), weight)
    if norm.bias is not None:
        wide = relax.op.add(wide, op.astype(norm.bias, "float32")._expr)
    return rounded(wrap_nested(wide, "norm"), x.dtype)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply x (b, s, columns) by a [rows, columns] matrix, transposed, into float32."""
    return op.matmul(x, op.permute_dims(matrix), out_dtype="float32")


def linear(x: Tensor, linear: MPTLinear) -> Tensor:
    """Linear layer with a float32 accumulator, rounded once after the bias."""
    wide = product(x, linear.matrix())
    if linear.bias is not None:
        wide = wide + op.astype(linear.bias, "float32")
    return rounded(wide, x.dtype)


def clip(x: Tensor, limit: float | None) -> Tensor:
    """Clamp to [-limit, limit]; None leaves `x` alone."""
    if limit is None:
        return x
    return wrap_nested(relax.op.clip(x._expr, -limit, limit), "clip")


def split(qkv: Tensor, config: MPTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Split the rows of the fused projection: all of q, then all of k, then all of v."""
    d, kv = config.d_model, config.kv_dim
    q, k, v = op.split(qkv, [d, d + kv], axis=-1)
    return q, k, v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Give every head an axis of its own."""
    b, s, features = x.shape
    return op.reshape(x, (b, s, heads, features // heads))


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side."""
    b, s, h, d = x.shape
    return op.reshape(x, (b, s, h * d))


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function, in float32 and rounded once.

    Left to itself, Relax rounds erf to the storage dtype before adding 0.5.
    """
    return rounded(op.gelu(op.astype(x, "float32")), x.dtype)


def residual(x: Tensor, update: Tensor) -> Tensor:
    """Add the update to the stream, rounded to the storage dtype."""
    wide = op.astype(x, "float32") + op.astype(update, "float32")
    return rounded(wide, x.dtype)


def scaled(logits: Tensor, logit_scale: float | None) -> Tensor:
    """Apply logit_scale, which counts even when it is 0."""
    return logits if logit_scale is None else logits * logit_scale


def unembed(hidden: Tensor, table: MPTEmbedding, logit_scale: float | None) -> Tensor:
    """Logits in float32: the accumulator is not rounded."""
    return scaled(product(hidden, table.matrix()), logit_scale)


def block(ops: Operations, block: MPTBlock, hidden: Tensor, tap: Tap) -> Tensor:
    """Pre-norm block with sequential residuals."""
    config = block.config
    attn, ffn = block.attn, block.ffn
    x = tap("norm_1", ops.norm(hidden, block.norm_1))
    qkv = tap("attn.Wqkv", ops.clip(ops.linear(x, attn.Wqkv), config.clip_qkv))
    q, k, v = ops.split(qkv, config)
    if config.qk_ln:
        q = tap("attn.q_ln", ops.norm(q, attn.q_ln))
        k = tap("attn.k_ln", ops.norm(k, attn.k_ln))
    context = ops.attention(
        ops.split_heads(q, config.n_heads),
        ops.split_heads(k, config.kv_n_heads),
        ops.split_heads(v, config.kv_n_heads),
        Tensor.from_const(ops.slopes(config)),
        config,
    )
    x = tap("attn.context", ops.merge_heads(context))
    x = tap("attn.out_proj", ops.linear(x, attn.out_proj))
    hidden = tap("attn.residual", ops.residual(hidden, x))
    x = tap("norm_2", ops.norm(hidden, block.norm_2))
    x = tap("ffn.up_proj", ops.linear(x, ffn.up_proj))
    x = tap("ffn.act", ops.activation(x))
    x = tap("ffn.down_proj", ops.linear(x, ffn.down_proj))
    return tap("output", ops.residual(hidden, x))


PLAIN = Operations(
    slopes=alibi.slopes,
    embed=embed,
    positions=positions,
    positions_after=positions_after,
    mix=mix,
    norm=norm,
    linear=linear,
    clip=clip,
    split=split,
    split_heads=split_heads,
    attention=Attention(),
    cached=CachedAttention(),
    merge_heads=merge_heads,
    activation=gelu,
    residual=residual,
    unembed=unembed,
    block=block,
)
"""Relax operators only: what every target can lower, and what the kernels are measured against."""
