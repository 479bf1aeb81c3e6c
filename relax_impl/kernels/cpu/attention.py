"""Flash attention: one pass over the keys with a running maximum, no tensor of scores."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from relax_impl.attention import MASKED, Attention, causal
from relax_impl.config import MPTConfig
from relax_impl.kernels.cpu.vector import LANES, at, exp, narrow, splat, spread, widen
from relax_impl.target import wide_vectors

TILE = 6
"""Queries that share the keys held in registers."""
KEYS = 128
"""Keys per step of the running maximum."""
QUERIES = 48
"""Queries per task."""


@cache
def flash_kernel(
    attention: Attention, config: MPTConfig, dtype: str, scale: float, wide: bool
) -> tirx.PrimFunc:
    """Attention of q (b, sq, H, D) over k and v (b, sk, kvH, D) with slopes (H,).

    Keys and values are first packed in float32: panels of 16 keys, features outermost, so that one
    vector holds one feature of 16 keys; values row by row, filled up to whole vectors. Then every
    task takes 48 queries of one head and walks 6 of them at a time over blocks of 128 keys: scores
    in registers, running maximum, sum and context rescaled per block. Blocks that no query of the
    tile can see are not visited. The maximum starts at the most negative finite float32, below any
    ALiBi bias (-5.5e4 for 65536 positions).
    """
    heads, kv_heads, dim = config.n_heads, config.kv_n_heads, config.head_dim
    group = heads // kv_heads
    pair = 2 if wide else 1
    stride = LANES * pair
    slabs = -(-dim // LANES)
    slab_pair = 2 if wide and slabs % 2 == 0 else 1
    padded = slabs * LANES
    whole = dim // LANES
    has_bias = config.alibi
    bias: Any = attention.bias
    visible: Any = attention.visible
    score: Any = attention.score
    probability: Any = attention.probability
    has_mask, has_score = visible is not None, score is not None
    has_probability = probability is not None
    is_causal = visible is causal

    @T.inline
    def pack(b: Any, sk: Any, panels: Any, K: Any, V: Any, Kp: Any, Vp: Any) -> None:
        for t in T.parallel(b * kv_heads * panels):
            n = t // (kv_heads * panels)
            h = t // panels % kv_heads
            p = t % panels
            for j in range(LANES):
                key = p * LANES + j
                if key < sk:
                    for d in range(dim):
                        Kp[t, d, j] = widen(K[n, key, h, d])
                    for s in range(whole):
                        Vp[t, j, at(s * LANES, LANES)] = widen(V[n, key, h, at(s * LANES, LANES)])
                    for d in range(dim - whole * LANES):
                        Vp[t, j, whole * LANES + d] = widen(V[n, key, h, whole * LANES + d])
                    for d in range(padded - dim):
                        Vp[t, j, dim + d] = T.float32(0)
                else:
                    for d in range(dim):
                        Kp[t, d, j] = T.float32(0)

    @T.inline
    def scores(
        Qt: Any, Kp: Any, St: Any, slope: Any, panel: Any, slot: Any, query: Any, key: Any, sk: Any
    ) -> None:
        acc = T.alloc_buffer((TILE * stride,), "float32", scope="local")
        for t in T.unroll(TILE * pair):
            acc[at(t * LANES, LANES)] = splat(0.0, LANES)
        for d in range(dim):
            for r in T.unroll(TILE):
                for p in T.unroll(pair):
                    acc[at((r * pair + p) * LANES, LANES)] = T.fma(
                        spread(Qt[r, d], LANES),
                        Kp[panel + p, d, at(0, LANES)],
                        acc[at((r * pair + p) * LANES, LANES)],
                    )
        for r in T.unroll(TILE):
            for p in T.unroll(pair):
                here = T.ramp(key + p * LANES, 1, LANES)
                me = spread(query + r, LANES)
                place = slot * LANES + p * LANES
                St[r, at(place, LANES)] = acc[at((r * pair + p) * LANES, LANES)]
                if has_bias:
                    St[r, at(place, LANES)] = St[r, at(place, LANES)] + bias(
                        spread(slope, LANES), T.Cast("float32x16", here - me)
                    )
                if has_score:
                    St[r, at(place, LANES)] = score(St[r, at(place, LANES)])
        # Past the first query of the tile the causal mask begins, past sk there is nothing.
        if has_mask and (not is_causal or key + stride - 1 > query):
            for r in T.unroll(TILE):
                for p in T.unroll(pair):
                    St[r, at(slot * LANES + p * LANES, LANES)] = T.Select(
                        visible(spread(query + r, LANES), T.ramp(key + p * LANES, 1, LANES)),
                        St[r, at(slot * LANES + p * LANES, LANES)],
                        splat(MASKED, LANES),
                    )
        if key + stride > sk:
            for r in T.unroll(TILE):
                for p in T.unroll(pair):
                    St[r, at(slot * LANES + p * LANES, LANES)] = T.Select(
                        T.ramp(key + p * LANES, 1, LANES) < spread(sk, LANES),
                        St[r, at(slot * LANES + p * LANES, LANES)],
                        splat(float("-inf"), LANES),
                    )

    @T.inline
    def running(St: Any, top: Any, total: Any, Ot: Any, vectors: Any) -> None:
        for r in range(TILE):
            lane = T.alloc_buffer((LANES,), "float32", scope="local")
            now = T.alloc_buffer((2,), "float32", scope="local")
            lane[at(0, LANES)] = splat(MASKED, LANES)
            for p in range(vectors):
                lane[at(0, LANES)] = T.max(lane[at(0, LANES)], St[r, at(p * LANES, LANES)])
            now[0] = top[r]
            for q in T.unroll(LANES):
                now[0] = T.max(now[0], lane[q])
            now[1] = exp(top[r] - now[0])
            top[r] = now[0]
            lane[at(0, LANES)] = splat(0.0, LANES)
            for p in range(vectors):
                St[r, at(p * LANES, LANES)] = exp(
                    St[r, at(p * LANES, LANES)] - spread(now[0], LANES)
                )
                lane[at(0, LANES)] = lane[at(0, LANES)] + St[r, at(p * LANES, LANES)]
                if has_probability:
                    St[r, at(p * LANES, LANES)] = probability(St[r, at(p * LANES, LANES)])
            total[r] = total[r] * now[1]
            for q in T.unroll(LANES):
                total[r] = total[r] + lane[q]
            for s in range(slabs):
                Ot[r, at(s * LANES, LANES)] = Ot[r, at(s * LANES, LANES)] * spread(now[1], LANES)

    @T.inline
    def weigh(St: Any, Vp: Any, Ot: Any, panel: Any, count: Any) -> None:
        for s in range(slabs // slab_pair):
            acc = T.alloc_buffer((TILE * slab_pair * LANES,), "float32", scope="local")
            for r in T.unroll(TILE):
                for p in T.unroll(slab_pair):
                    acc[at((r * slab_pair + p) * LANES, LANES)] = Ot[
                        r, at((s * slab_pair + p) * LANES, LANES)
                    ]
            for j in range(count):
                for r in T.unroll(TILE):
                    for p in T.unroll(slab_pair):
                        acc[at((r * slab_pair + p) * LANES, LANES)] = T.fma(
                            spread(St[r, j], LANES),
                            Vp[
                                panel + j // LANES,
                                j % LANES,
                                at((s * slab_pair + p) * LANES, LANES),
                            ],
                            acc[at((r * slab_pair + p) * LANES, LANES)],
                        )
            for r in T.unroll(TILE):
                for p in T.unroll(slab_pair):
                    Ot[r, at((s * slab_pair + p) * LANES, LANES)] = acc[
                        at((r * slab_pair + p) * LANES, LANES)
                    ]

    @T.prim_func(private=True, s_tir=True)
    def kernel(q: T.handle, k: T.handle, v: T.handle, slopes: T.handle, o: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        sq = T.int64()
        sk = T.int64()
        Q = T.match_buffer(q, (b, sq, heads, dim), dtype)
        K = T.match_buffer(k, (b, sk, kv_heads, dim), dtype)
        V = T.match_buffer(v, (b, sk, kv_heads, dim), dtype)
        M = T.match_buffer(slopes, (heads,), "float32")
        Y = T.match_buffer(o, (b, sq, heads, dim), dtype)
        Kp = T.alloc_buffer((b * kv_heads * ((sk + stride - 1) // stride * pair), dim, LANES))
        Vp = T.alloc_buffer((b * kv_heads * ((sk + stride - 1) // stride * pair), LANES, padded))
        panels = (sk + stride - 1) // stride * pair
        pack(b, sk, panels, K, V, Kp, Vp)
        chunks = (sq + QUERIES - 1) // QUERIES
        for t in T.parallel(b * heads * chunks):
            n = t // (heads * chunks)
            h = t // chunks % heads
            # First and last chunks alternate: later queries see more keys.
            c = t % chunks
            chunk = T.if_then_else(c % 2 == 0, c // 2, chunks - 1 - c // 2)
            base = (n * kv_heads + h // group) * panels
            Qt = T.alloc_buffer((TILE, dim), "float32", scope="local")
            St = T.alloc_buffer((TILE, KEYS), "float32", scope="local")
            Ot = T.alloc_buffer((TILE, padded), "float32", scope="local")
            top = T.alloc_buffer((TILE,), "float32", scope="local")
            total = T.alloc_buffer((TILE,), "float32", scope="local")
            for u in range((T.min(T.int64(QUERIES), sq - chunk * QUERIES) + TILE - 1) // TILE):
                i = chunk * QUERIES + u * TILE
                for r in range(TILE):
                    for d in range(dim):
                        Qt[r, d] = widen(Q[n, T.min(i + r, sq - 1), h, d]) * T.float32(scale)
                    for s in range(slabs):
                        Ot[r, at(s * LANES, LANES)] = splat(0.0, LANES)
                    top[r] = T.float32(MASKED)
                    total[r] = T.float32(0)
                first = T.Cast("int32", i + sk - sq)
                seen = T.alloc_buffer((1,), "int64", scope="local")
                if is_causal:
                    seen[0] = T.min(i + sk - sq + TILE, sk)
                else:
                    seen[0] = sk
                for w in range((seen[0] + KEYS - 1) // KEYS):
                    start = w * KEYS
                    count = T.min(T.int64(KEYS), seen[0] - start)
                    steps = (count + stride - 1) // stride
                    for p in range(steps):
                        scores(
                            Qt,
                            Kp,
                            St,
                            M[h],
                            base + start // LANES + p * pair,
                            p * pair,
                            first,
                            T.Cast("int32", start + p * stride),
                            T.Cast("int32", sk),
                        )
                    running(St, top, total, Ot, steps * pair)
                    weigh(St, Vp, Ot, base + start // LANES, count)
                for r in range(TILE):
                    if i + r < sq:
                        for s in range(whole):
                            Y[n, i + r, h, at(s * LANES, LANES)] = narrow(
                                Ot[r, at(s * LANES, LANES)] / spread(total[r], LANES), dtype
                            )
                        for d in range(dim - whole * LANES):
                            Y[n, i + r, h, whole * LANES + d] = narrow(
                                Ot[r, whole * LANES + d] / total[r], dtype
                            )

    return kernel


def flash(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, config: MPTConfig
) -> Tensor:
    """Lower attention to the flash kernel."""
    kernel = flash_kernel(attention, config, q.dtype, attention.scale(config), wide_vectors())
    return op.tensor_ir_op(
        kernel, "attention", [q, k, v, slopes], Tensor.placeholder(q.shape, q.dtype)
    )
