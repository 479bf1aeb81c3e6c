"""Kernels for Hopper GPUs (sm_90a), and the operations made of them.

Where a kernel does not fit (float32, odd widths), the same operation in Relax operators takes its
place, with the same roundings.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from relax_impl.attention import Attention, portable
from relax_impl.cached import CachedAttention, WithPast
from relax_impl.config import MPTConfig
from relax_impl.kernels.cuda import attention as flash_attention
from relax_impl.kernels.cuda import gemm as products
from relax_impl.kernels.cuda import norm as norms
from relax_impl.kernels.cuda import past as pasts
from relax_impl.operations import PLAIN, Operations, Tap, product, rounded, scaled

if TYPE_CHECKING:
    from relax_impl.model import MPTBlock, MPTEmbedding, MPTLinear, MPTNorm


def finished(
    x: Tensor,
    linear: MPTLinear,
    *,
    clip: float | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer and what follows it, in float32 and rounded once."""
    if products.fits(x.dtype, linear.rows, linear.columns):
        return products.gemm(x, linear.weight, linear.bias, clip=clip, gelu=gelu, residual=residual)
    wide = product(x, linear.matrix())
    if linear.bias is not None:
        wide = wide + op.astype(linear.bias, "float32")
    if clip is not None:
        wide = op.minimum(op.maximum(wide, -clip), clip)
    if gelu:
        wide = op.gelu(wide)
    if residual is not None:
        wide = wide + op.astype(residual, "float32")
    return rounded(wide, x.dtype)


def linear(x: Tensor, linear: MPTLinear) -> Tensor:
    """Linear layer, see `operations.linear`."""
    return finished(x, linear)


def unembed(hidden: Tensor, table: MPTEmbedding, logit_scale: float | None) -> Tensor:
    """Logits in float32, see `operations.unembed`."""
    if not products.fits(hidden.dtype, table.rows, table.columns):
        return PLAIN.unembed(hidden, table, logit_scale)
    return scaled(products.gemm(hidden, table.weight, out_dtype="float32"), logit_scale)


def norm(x: Tensor, norm: MPTNorm) -> Tensor:
    """Layer norm or RMS norm, see `operations.norm`."""
    if not norms.fits(x.dtype, int(x.shape[-1])):
        return portable_norm(x, norm)
    return norms.norm(x, norm.weight, norm.bias, norm.epsilon, norm.is_rms)


def exactly(intrinsic: str, x: Tensor, *more: float) -> Tensor:
    """Apply one of CUDA's float32 functions that round as IEEE 754 says, whatever flags compile it.

    TVM compiles with ``--use_fast_math``: quotients and roots become approximations of up to 2 ulp
    that err to one side.
    """

    def emit(x: Any) -> Any:
        constants = [tirx.const(value, "float32") for value in more]

        def element(*at: Any) -> Any:
            return tirx.call_pure_extern("float32", intrinsic, x[at], *constants)

        return te.compute(x.shape, element, name="exactly")

    return op.tensor_expr_op(emit, "exactly", [x])


def portable_norm(x: Tensor, norm: MPTNorm) -> Tensor:
    """Layer norm or RMS norm in operators, see `operations.norm`.

    The mean and the root are rounded to nearest: an error of theirs is that of a whole row.
    """
    width = float(x.shape[-1])

    def mean(wide: Tensor) -> Tensor:
        return exactly("__fdiv_rn", op.sum(wide, -1, keepdims=True), width)

    wide = op.astype(x, "float32")
    if not norm.is_rms:
        wide = wide - mean(wide)
    wide = wide * exactly("__frsqrt_rn", mean(wide * wide) + norm.epsilon)
    wide = wide * op.astype(norm.weight, "float32")
    if norm.bias is not None:
        wide = wide + op.astype(norm.bias, "float32")
    return rounded(wide, x.dtype)


def plain(attention: Attention) -> bool:
    """Whether attention is what the kernels compute: they know no other bias, mask or rounding."""
    return attention == Attention(scale=attention.scale, lowering=attention.lowering)


def has_kernel(attention: Attention, dtype: str, config: MPTConfig) -> bool:
    """Whether the kernel computes this attention."""
    return plain(attention) and flash_attention.fits(dtype, config.head_dim)


def plain_past(attention: object, dtype: str, config: MPTConfig) -> WithPast | None:
    """Return attention over a cache if it is what the kernel computes."""
    if (
        isinstance(attention, WithPast)
        and attention.cached == CachedAttention()
        and plain(attention.attention)
        and pasts.fits(dtype, config.head_dim)
    ):
        return attention
    return None


def flash(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, config: MPTConfig
) -> Tensor:
    """Lower attention to the kernel, over three tensors (b, s, heads, D)."""
    if not has_kernel(attention, q.dtype, config):
        return portable(attention, q, k, v, slopes, config)
    flat = tuple(op.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3])) for x in (q, k, v))
    heads = (config.n_heads, config.kv_n_heads, config.head_dim)
    scale = attention.scale(config)
    context = flash_attention.flash(flat, (0, 0, 0), slopes, heads, scale, config.alibi)
    return op.reshape(context, q.shape)


def untouched(ops: Operations, *fields: str) -> bool:
    """Whether these building blocks are the ones that the fused kernels stand for."""
    return all(getattr(ops, field) == getattr(FAST, field) for field in fields)


def attend(ops: Operations, block: MPTBlock, qkv: Tensor, tap: Tap) -> Tensor:
    """Context (b, s, d_model) of the fused projection."""
    config, attn = block.config, block.attn
    slopes = Tensor.from_const(ops.slopes(config))
    attention = ops.attention
    d, kv = config.d_model, config.kv_dim
    fused = untouched(ops, "split", "split_heads", "merge_heads")
    if (
        not config.qk_ln
        and fused
        and isinstance(attention, Attention)
        and has_kernel(attention, qkv.dtype, config)
    ):
        heads = (config.n_heads, config.kv_n_heads, config.head_dim)
        scale = attention.scale(config)
        return flash_attention.flash(
            (qkv, qkv, qkv), (0, d, d + kv), slopes, heads, scale, config.alibi
        )
    over = plain_past(attention, qkv.dtype, config) if fused else None
    if over and not config.qk_ln:
        scale = over.attention.scale(config)
        columns = (0, d, d + kv)
        return pasts.over_past((qkv, qkv, qkv), columns, slopes, scale, config, over.past)
    q, k, v = ops.split(qkv, config)
    if config.qk_ln:
        q = tap("attn.q_ln", ops.norm(q, attn.q_ln))
        k = tap("attn.k_ln", ops.norm(k, attn.k_ln))
    if over:
        scale = over.attention.scale(config)
        return pasts.over_past((q, k, qkv), (0, 0, d + kv), slopes, scale, config, over.past)
    q = ops.split_heads(q, config.n_heads)
    k, v = (ops.split_heads(x, config.kv_n_heads) for x in (k, v))
    return ops.merge_heads(attention(q, k, v, slopes, config))


def project(ops: Operations, block: MPTBlock, x: Tensor) -> Tensor:
    """Queries, keys and values, clipped."""
    linear, limit = block.attn.Wqkv, block.config.clip_qkv
    if untouched(ops, "linear", "clip"):
        return finished(x, linear, clip=limit)
    return ops.clip(ops.linear(x, linear), limit)


def activate(ops: Operations, up: MPTLinear, x: Tensor, tap: Tap) -> Tensor:
    """GELU of the up projection."""
    projected = tap("ffn.up_proj", ops.linear(x, up))
    if untouched(ops, "linear", "activation"):
        return finished(x, up, gelu=True)
    return ops.activation(projected)


def join(
    ops: Operations, linear: MPTLinear, x: Tensor, hidden: Tensor, tap: Tap, at: str
) -> Tensor:
    """The stream plus a projection, whose tap is `at`."""
    update = tap(at, ops.linear(x, linear))
    if untouched(ops, "linear", "residual"):
        return finished(x, linear, residual=hidden)
    if untouched(ops, "linear") and products.fits(x.dtype, linear.rows, linear.columns):
        # Another sum sees what the kernel's own would see: a product that is not rounded yet.
        wide = products.gemm(x, linear.weight, linear.bias, out_dtype="float32")
        joined = ops.residual(hidden, wide)
        return joined if joined.dtype == hidden.dtype else rounded(joined, hidden.dtype)
    return ops.residual(hidden, update)


def block(ops: Operations, block: MPTBlock, hidden: Tensor, tap: Tap) -> Tensor:
    """Pre-norm block in which GELU and the residual sums see unrounded products.

    A tap of such a product is computed beside it, from the same input; in a function that keeps no
    taps it is dead code.
    """
    attn, ffn = block.attn, block.ffn
    x = tap("norm_1", ops.norm(hidden, block.norm_1))
    qkv = tap("attn.Wqkv", project(ops, block, x))
    context = tap("attn.context", attend(ops, block, qkv, tap))
    joined = join(ops, attn.out_proj, context, hidden, tap, "attn.out_proj")
    hidden = tap("attn.residual", joined)
    x = tap("norm_2", ops.norm(hidden, block.norm_2))
    x = tap("ffn.act", activate(ops, ffn.up_proj, x, tap))
    return tap("output", join(ops, ffn.down_proj, x, hidden, tap, "ffn.down_proj"))


FAST = dataclasses.replace(
    PLAIN,
    norm=norm,
    linear=linear,
    attention=Attention(lowering=flash),
    unembed=unembed,
    block=block,
)
"""Every heavy operation as a kernel of this directory."""


def roundings(config: MPTConfig, dtype: str) -> dict[str, str]:
    """Where `FAST` rounds to the storage dtype, in the words of the subject protocol.

    Hopper's matrix unit cuts what it holds towards zero with every 16 products, as
    ``benchmarks/gpu_accumulator.py`` shows; products of few rows and of float32 are not its.
    """
    kernel = flash_attention.fits(dtype, config.head_dim)
    cut = products.fits(dtype, config.d_model, config.d_model)
    return {
        "scores": "float32",
        "probabilities": "storage" if kernel else "float32",
        "residual": "fused",
        "activation": "fused",
        "accumulator": "float32_cut" if cut else "float32",
    }
