"""Attention with a past: what lies in the cache, and which of it a query sees.

A layer's keys and values lie in two tensors of the storage dtype. Slot p of sequence n holds what
token p left there, after clipping and normalisation, before any bias: ALiBi is a function of the
distance alone and nothing of it is stored, so that there is no table to run out of.

* keys ``(b, kv_heads, panels, head_dim, 16)``: panels of 16 slots, slots innermost, as a kernel
  reads them: one vector is one feature of 16 keys;
* values ``(b, kv_heads, panels * 16, head_dim)``.

Together 2 * kv_heads * head_dim * capacity * bytes for a sequence and a layer, and nothing else.

TVM's own paged cache (`tvm.relax.frontend.nn.llm.kv_cache`) was looked at first. It knows rotary
positions only: `RopeMode` is NONE, NORMAL or INLINE, `attention_with_fused_qkv` takes no bias and
no slopes, and its runtime calls the attention kernels with a fixed list of arguments (offsets,
rotary scale and theta, softmax scale). ALiBi could enter only as slopes built into copies of all
those kernels. Hence a cache of our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import tvm
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from relax_impl.attention import MASKED, Attention
from relax_impl.config import MPTConfig

Expr = Any
PANEL = 16
"""Slots in a panel of keys; capacities are multiples of it."""


def key_shape(config: MPTConfig, batch: Any, panels: Any) -> tuple[Any, ...]:
    """Shape of a layer's keys."""
    return (batch, config.kv_n_heads, panels, config.head_dim, PANEL)


def value_shape(config: MPTConfig, batch: Any, panels: Any) -> tuple[Any, ...]:
    """Shape of a layer's values."""
    return (batch, config.kv_n_heads, panels * PANEL, config.head_dim)


def after_the_past(past: Expr, index: Expr, _: Expr) -> Expr:
    """Place of new token `index` of a sequence that holds `past` tokens."""
    return past + index


def own_head(head: Expr, _count: Expr, _config: MPTConfig) -> Expr:
    """Leave a head alone."""
    return head


def own(index: Expr, _: Expr) -> Expr:
    """Leave an index alone."""
    return index


def first(start: Expr, _past: Expr, _count: Expr) -> Expr:
    """First slot that can be seen."""
    return start


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """Attention of new tokens over all that a cache holds, theirs included.

    Every piece is an expression over int32 scalars, and replaceable, as in `Attention`, whose
    pieces (bias, mask, scale) are used on top.

    Parameters
    ----------
    key_slot, value_slot
        Where a new token's key and value are stored: of (past, index, number of new tokens).
    position
        Position of a query for the bias; of the same.
    edge
        Position of a query for the mask; of the same.
    start
        First slot that is seen, of (start, past, number of new tokens): slots before hold padding.
    written, read
        Sequence of the cache that a sequence of the batch writes and reads: of (sequence, number of
        new tokens).
    head
        Head whose slope a head uses, of (head, number of new tokens, config).
    key_head
        Key head that a query head reads, of (key head, number of new tokens).
    bias
        Instead of the attention's: of (slope, distance, number of new tokens), the first two
        float32 and perhaps vectors.
    lowering
        Emits the computation: `portable`, or a kernel.
    """

    key_slot: Callable[[Expr, Expr, Expr], Expr] = after_the_past
    value_slot: Callable[[Expr, Expr, Expr], Expr] = after_the_past
    position: Callable[[Expr, Expr, Expr], Expr] = after_the_past
    edge: Callable[[Expr, Expr, Expr], Expr] = after_the_past
    start: Callable[[Expr, Expr, Expr], Expr] = first
    written: Callable[[Expr, Expr], Expr] = own
    read: Callable[[Expr, Expr], Expr] = own
    head: Callable[[Expr, Expr, MPTConfig], Expr] = own_head
    key_head: Callable[[Expr, Expr], Expr] = own
    bias: Callable[[Expr, Expr, Expr], Expr] | None = None
    lowering: Callable[..., Tensor] | None = None

    def __call__(
        self,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        config: MPTConfig,
        past: Past,
    ) -> Tensor:
        """Store k and v (b, s, kvH, D), then attend with q (b, s, H, D); returns (b, s, H, D)."""
        held = Past(
            past.lengths,
            past.starts,
            store(self, "keys", past.keys, k, past.lengths),
            store(self, "values", past.values, v, past.lengths),
        )
        return (self.lowering or portable)(self, attention, q, slopes, config, held)


@dataclasses.dataclass(frozen=True)
class Past:
    """What a layer is given of the past.

    Attributes
    ----------
    lengths
        Tokens held before this call, (b,) int32.
    starts
        First slot that is no padding, (b,) int32.
    keys, values
        The layer's cache; the calls that store change it in place.
    """

    lengths: Tensor
    starts: Tensor
    keys: Tensor
    values: Tensor


@dataclasses.dataclass(frozen=True)
class WithPast:
    """Attention of a layer that is given a past, in the place of one without; see `Attention`.

    Attributes
    ----------
    cached, attention
        What is done with the past, and the pieces that it shares with the attention without one.
    past
        What the layer is given.
    """

    cached: CachedAttention
    attention: Attention
    past: Past

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, config: MPTConfig
    ) -> Tensor:
        """Emit the attention; returns the context, (b, s, H, D) in q's dtype."""
        return self.cached(self.attention, q, k, v, slopes, config, self.past)


def bias_of(cached: CachedAttention, attention: Attention) -> Callable[[Expr, Expr, Expr], Expr]:
    """Return the bias that is in force: of (slope, distance, number of new tokens)."""
    plain = attention.bias
    return cached.bias or (lambda slope, distance, _count: plain(slope, distance))


def store(cached: CachedAttention, what: str, cache: Tensor, new: Tensor, past: Tensor) -> Tensor:
    """Write new tokens (b, s, kvH, D) into a cache, in place."""
    _, _, heads, dim = (int(size) if i > 1 else size for i, size in enumerate(new.shape))
    kernel = _store_kernel(cached, what, heads, dim, new.dtype)
    return op.tensor_ir_inplace_op(
        kernel, f"store_{what}", [cache, new, past], 0, Tensor.placeholder(cache.shape, cache.dtype)
    )


@cache
def _store_text(cached: CachedAttention, what: str, heads: int, dim: int, dtype: str) -> str:
    """Return the kernel as JSON.

    Parsing takes long, and a function that several modules share would carry over what one of them
    has written on it: then the same model would not be the same module in another process.
    """
    return str(tvm.ir.save_json(_store_function(cached, what, heads, dim, dtype)))


def _store_kernel(
    cached: CachedAttention, what: str, heads: int, dim: int, dtype: str
) -> tirx.PrimFunc:
    return tvm.ir.load_json(_store_text(cached, what, heads, dim, dtype))


def _store_function(
    cached: CachedAttention, what: str, heads: int, dim: int, dtype: str
) -> tirx.PrimFunc:
    slot: Any = cached.key_slot if what == "keys" else cached.value_slot
    row: Any = cached.written

    if what == "keys":

        @T.prim_func(private=True, s_tir=True)
        def keys(c: T.handle, x: T.handle, p: T.handle) -> None:
            T.func_attr({"tirx.noalias": True})
            b, s, panels = T.int64(), T.int64(), T.int64()
            C = T.match_buffer(c, (b, heads, panels, dim, PANEL), dtype)
            X = T.match_buffer(x, (b, s, heads, dim), dtype)
            P = T.match_buffer(p, (b,), "int32")
            for n, i, h, d in T.grid(b, s, heads, dim):
                with T.sblock("store"):
                    vn, vi, vh, vd = T.axis.remap("SSSS", [n, i, h, d])
                    C[
                        row(vn, s),
                        vh,
                        T.Cast("int64", slot(P[vn], T.Cast("int32", vi), T.Cast("int32", s)))
                        // PANEL,
                        vd,
                        T.Cast("int64", slot(P[vn], T.Cast("int32", vi), T.Cast("int32", s)))
                        % PANEL,
                    ] = X[vn, vi, vh, vd]

        return keys

    @T.prim_func(private=True, s_tir=True)
    def values(c: T.handle, x: T.handle, p: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s, capacity = T.int64(), T.int64(), T.int64()
        C = T.match_buffer(c, (b, heads, capacity, dim), dtype)
        X = T.match_buffer(x, (b, s, heads, dim), dtype)
        P = T.match_buffer(p, (b,), "int32")
        for n, i, h, d in T.grid(b, s, heads, dim):
            with T.sblock("store"):
                vn, vi, vh, vd = T.axis.remap("SSSS", [n, i, h, d])
                C[
                    row(vn, s),
                    vh,
                    T.Cast("int64", slot(P[vn], T.Cast("int32", vi), T.Cast("int32", s))),
                    vd,
                ] = X[vn, vi, vh, vd]

    return values


def portable(
    cached: CachedAttention,
    attention: Attention,
    q: Tensor,
    slopes: Tensor,
    config: MPTConfig,
    past: Past,
) -> Tensor:
    """Lower to operators that any target can schedule; scores exist as one tensor."""
    b, s, heads, dim = q.shape
    kv_heads, group = config.kv_n_heads, config.n_heads // config.kv_n_heads
    bias = bias_of(cached, attention)

    # Sizes are taken from the arguments: each of these becomes a function of its own. The query is
    # among them because the number of new tokens is.
    def unpacked(keys: Any, q: Any) -> Any:
        n, _, panels, _, _ = keys.shape
        count = q.shape[1]
        return te.compute(
            (n, kv_heads, 1, dim, panels * PANEL),
            lambda n, h, g, d, j: keys[
                cached.read(n, count), cached.key_head(h, count), j // PANEL, d, j % PANEL
            ].astype("float32"),
            name="keys",
        )

    def widened(values: Any, q: Any) -> Any:
        n, _, capacity, _ = values.shape
        count = q.shape[1]
        return te.compute(
            (n, kv_heads, 1, capacity, dim),
            lambda n, h, g, j, d: values[
                cached.read(n, count), cached.key_head(h, count), j, d
            ].astype("float32"),
            name="values",
        )

    def score(qk: Any, slopes: Any, lengths: Any, starts: Any) -> Any:
        new = qk.shape[3]
        count = tirx.Cast("int32", new)

        def element(n: Any, h: Any, g: Any, i: Any, j: Any) -> Any:
            at = (tirx.convert(lengths[n]), i.astype("int32"), count)
            key = j.astype("int32")
            value = tirx.convert(qk[n, h, g, i, j])
            if config.alibi:
                slope = tirx.convert(slopes[cached.head(h * group + g, new, config)])
                value = value + bias(slope, (key - cached.position(*at)).astype("float32"), count)
            if attention.score is not None:
                value = attention.score(value)
            masked = tirx.const(MASKED, "float32")
            if attention.visible is not None:
                value = tirx.Select(attention.visible(cached.edge(*at), key), value, masked)
            within = tirx.all(
                key >= cached.start(tirx.convert(starts[n]), at[0], count), key < at[0] + count
            )
            return tirx.Select(within, value, masked)

        return te.compute(qk.shape, element, name="score")

    wide = op.permute_dims(
        op.reshape(op.astype(q, "float32"), (b, s, kv_heads, group, dim)), [0, 2, 3, 1, 4]
    )
    keys = op.tensor_expr_op(unpacked, "keys", [past.keys, q])
    values = op.tensor_expr_op(widened, "values", [past.values, q])
    qk = op.matmul(wide * attention.scale(config), keys)
    p = op.softmax(
        op.tensor_expr_op(score, "score", [qk, slopes, past.lengths, past.starts]), axis=-1
    )
    if attention.probability is not None:
        piece = attention.probability
        p = op.tensor_expr_op(
            lambda p: te.compute(p.shape, lambda *at: piece(tirx.convert(p[at]))), "round", [p]
        )
    context = op.permute_dims(op.matmul(p, values), [0, 3, 1, 2, 4])
    return op.astype(op.reshape(context, (b, s, heads, dim)), q.dtype)
