"""Attention over a cache: the flash kernel's arithmetic, read where keys and values lie.

A query's scores, blocks of 128 keys from slot 0, running maximum and sums are those of
`attention.flash_kernel`, operation by operation; only what is computed beside it differs. A
sequence without padding therefore gets the same bits by any split into chunks.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from relax_impl.attention import MASKED, Attention, causal
from relax_impl.cached import PANEL, CachedAttention, Past, bias_of
from relax_impl.config import MPTConfig
from relax_impl.kernels.cpu.vector import LANES, at, exp, narrow, splat, spread, widen

TILE = 6
"""Queries that share the keys held in registers, where a call brings so many."""
KEYS = 128
"""Keys per step of the running maximum, counted from slot 0."""
QUERIES = 48
"""Queries per task."""
SIDE = 4
"""Panels of keys side by side for a single query: its sums are enough to hide the latency."""
assert PANEL == LANES


@cache
def cached_kernel(
    cached: CachedAttention, attention: Attention, config: MPTConfig, dtype: str, scale: float
) -> tirx.PrimFunc:
    """Attention of q (b, s, H, D) over cached keys and values, with slopes (H,).

    No key and no value is copied: they are widened in registers. The scratch of a task is one tile
    of 6 by 128 scores, whatever the lengths.
    """
    heads, kv_heads, dim = config.n_heads, config.kv_n_heads, config.head_dim
    group = heads // kv_heads
    slabs = -(-dim // LANES)
    padded = slabs * LANES
    whole = dim // LANES
    together = math.gcd(whole, SIDE) if whole else 1
    has_bias = config.alibi
    bias: Any = bias_of(cached, attention)
    visible: Any = attention.visible
    score: Any = attention.score
    probability: Any = attention.probability
    has_mask, has_score = visible is not None, score is not None
    has_probability = probability is not None
    is_causal = visible is causal
    position: Any = cached.position
    edge: Any = cached.edge
    start_of: Any = cached.start
    row_of: Any = cached.read

    def head_of(head: Any, count: Any) -> Any:
        return cached.head(head, count, config)

    key_head_of: Any = cached.key_head

    @T.inline
    def scores(
        mr: Any,
        np: Any,
        Qt: Any,
        Kc: Any,
        St: Any,
        slope: Any,
        n: Any,
        g: Any,
        panel: Any,
        slot: Any,
        query: Any,
        limit: Any,
        start: Any,
        sk: Any,
        new: Any,
    ) -> None:
        acc = T.alloc_buffer((mr * np * LANES,), "float32", scope="local")
        for t in T.unroll(mr * np):
            acc[at(t * LANES, LANES)] = splat(0.0, LANES)
        for d in range(dim):
            for r in T.unroll(mr):
                for p in T.unroll(np):
                    acc[at((r * np + p) * LANES, LANES)] = T.fma(
                        spread(Qt[r, d], LANES),
                        widen(Kc[n, g, panel + p, d, at(0, LANES)]),
                        acc[at((r * np + p) * LANES, LANES)],
                    )
        for r in T.unroll(mr):
            for p in T.unroll(np):
                here = T.ramp(T.Cast("int32", (panel + p) * LANES), 1, LANES)
                place = (slot + p) * LANES
                St[r, at(place, LANES)] = acc[at((r * np + p) * LANES, LANES)]
                if has_bias:
                    St[r, at(place, LANES)] = St[r, at(place, LANES)] + bias(
                        spread(slope, LANES),
                        T.Cast("float32x16", here - spread(query[r], LANES)),
                        new,
                    )
                if has_score:
                    St[r, at(place, LANES)] = score(St[r, at(place, LANES)])
                if has_mask:
                    St[r, at(place, LANES)] = T.Select(
                        visible(spread(limit[r], LANES), here),
                        St[r, at(place, LANES)],
                        splat(MASKED, LANES),
                    )
                # Neither padding nor what no token has written yet.
                St[r, at(place, LANES)] = T.Select(
                    here < spread(sk, LANES), St[r, at(place, LANES)], splat(float("-inf"), LANES)
                )
                St[r, at(place, LANES)] = T.Select(
                    here < spread(start, LANES),
                    splat(float("-inf"), LANES),
                    St[r, at(place, LANES)],
                )

    @T.inline
    def running(mr: Any, St: Any, top: Any, total: Any, Ot: Any, vectors: Any) -> None:
        for r in range(mr):
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
    def weigh(
        mr: Any,
        sg: Any,
        St: Any,
        Vc: Any,
        Ot: Any,
        n: Any,
        g: Any,
        key: Any,
        begin: Any,
        count: Any,
    ) -> None:
        for s in range(whole // sg):
            acc = T.alloc_buffer((mr * sg * LANES,), "float32", scope="local")
            for r in T.unroll(mr):
                for p in T.unroll(sg):
                    acc[at((r * sg + p) * LANES, LANES)] = Ot[r, at((s * sg + p) * LANES, LANES)]
            for j in range(begin, count):
                for r in T.unroll(mr):
                    for p in T.unroll(sg):
                        acc[at((r * sg + p) * LANES, LANES)] = T.fma(
                            spread(St[r, j], LANES),
                            widen(Vc[n, g, key + j, at((s * sg + p) * LANES, LANES)]),
                            acc[at((r * sg + p) * LANES, LANES)],
                        )
            for r in T.unroll(mr):
                for p in T.unroll(sg):
                    Ot[r, at((s * sg + p) * LANES, LANES)] = acc[at((r * sg + p) * LANES, LANES)]
        for r in range(mr):
            for j in range(begin, count):
                for d in range(dim - whole * LANES):
                    Ot[r, whole * LANES + d] = T.fma(
                        St[r, j],
                        widen(Vc[n, g, key + j, whole * LANES + d]),
                        Ot[r, whole * LANES + d],
                    )

    @T.inline
    def tile(
        mr: Any,
        np: Any,
        sg: Any,
        Q: Any,
        Kc: Any,
        Vc: Any,
        Y: Any,
        slope: Any,
        n: Any,
        row: Any,
        h: Any,
        g: Any,
        i: Any,
        past: Any,
        count: Any,
        start: Any,
    ) -> None:
        Qt = T.alloc_buffer((mr, dim), "float32", scope="local")
        St = T.alloc_buffer((mr, KEYS), "float32", scope="local")
        Ot = T.alloc_buffer((mr, padded), "float32", scope="local")
        top = T.alloc_buffer((mr,), "float32", scope="local")
        total = T.alloc_buffer((mr,), "float32", scope="local")
        query = T.alloc_buffer((mr,), "int32", scope="local")
        limit = T.alloc_buffer((mr,), "int32", scope="local")
        for r in range(mr):
            for d in range(dim):
                Qt[r, d] = widen(Q[n, i + r, h, d]) * T.float32(scale)
            for s in range(slabs):
                Ot[r, at(s * LANES, LANES)] = splat(0.0, LANES)
            top[r] = T.float32(MASKED)
            total[r] = T.float32(0)
            query[r] = position(past, T.Cast("int32", i + r), T.Cast("int32", count))
            limit[r] = edge(past, T.Cast("int32", i + r), T.Cast("int32", count))
        held = T.Cast("int64", past) + count
        seen = T.alloc_buffer((1,), "int64", scope="local")
        if is_causal:
            # Slots after the last query of the tile are not visited.
            seen[0] = T.max(T.int64(1), T.min(T.Cast("int64", limit[mr - 1]) + 1, held))
        else:
            seen[0] = held
        first = T.max(T.min(T.Cast("int64", start), seen[0] - 1), T.int64(0)) // KEYS
        for w in range((seen[0] + KEYS - 1) // KEYS - first):
            key = (first + w) * KEYS
            here = T.min(T.int64(KEYS), seen[0] - key)
            steps = (here + LANES - 1) // LANES
            for p in range(steps // np):
                scores(
                    mr,
                    np,
                    Qt,
                    Kc,
                    St,
                    slope,
                    row,
                    g,
                    key // LANES + p * np,
                    p * np,
                    query,
                    limit,
                    start,
                    T.Cast("int32", held),
                    T.Cast("int32", count),
                )
            if np > 1:
                for p in range(steps % np):
                    scores(
                        mr,
                        1,
                        Qt,
                        Kc,
                        St,
                        slope,
                        row,
                        g,
                        key // LANES + steps // np * np + p,
                        steps // np * np + p,
                        query,
                        limit,
                        start,
                        T.Cast("int32", held),
                        T.Cast("int32", count),
                    )
            running(mr, St, top, total, Ot, steps)
            weigh(
                mr,
                sg,
                St,
                Vc,
                Ot,
                row,
                g,
                key,
                T.max(T.int64(0), T.min(T.Cast("int64", start) - key, here)),
                here,
            )
        for r in range(mr):
            for s in range(whole):
                Y[n, i + r, h, at(s * LANES, LANES)] = narrow(
                    Ot[r, at(s * LANES, LANES)] / spread(total[r], LANES), dtype
                )
            for d in range(dim - whole * LANES):
                Y[n, i + r, h, whole * LANES + d] = narrow(
                    Ot[r, whole * LANES + d] / total[r], dtype
                )

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        lengths: T.handle,
        starts: T.handle,
        slopes: T.handle,
        o: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s, panels, capacity = T.int64(), T.int64(), T.int64(), T.int64()
        Q = T.match_buffer(q, (b, s, heads, dim), dtype)
        Kc = T.match_buffer(k, (b, kv_heads, panels, dim, LANES), dtype)
        Vc = T.match_buffer(v, (b, kv_heads, capacity, dim), dtype)
        P = T.match_buffer(lengths, (b,), "int32")
        S = T.match_buffer(starts, (b,), "int32")
        M = T.match_buffer(slopes, (heads,), "float32")
        Y = T.match_buffer(o, (b, s, heads, dim), dtype)
        chunks = (s + QUERIES - 1) // QUERIES
        for t in T.parallel(b * heads * chunks):
            n = t // (heads * chunks)
            h = t // chunks % heads
            # First and last chunks alternate: later queries see more keys.
            c = t % chunks
            chunk = T.if_then_else(c % 2 == 0, c // 2, chunks - 1 - c // 2)
            count = T.min(T.int64(QUERIES), s - chunk * QUERIES)
            start = start_of(S[n], P[n], T.Cast("int32", s))
            for u in range(count // TILE):
                tile(
                    TILE,
                    1,
                    1,
                    Q,
                    Kc,
                    Vc,
                    Y,
                    M[head_of(h, s)],
                    n,
                    row_of(n, s),
                    h,
                    key_head_of(h // group, s),
                    chunk * QUERIES + u * TILE,
                    P[n],
                    s,
                    start,
                )
            for u in range(count % TILE):
                tile(
                    1,
                    SIDE,
                    together,
                    Q,
                    Kc,
                    Vc,
                    Y,
                    M[head_of(h, s)],
                    n,
                    row_of(n, s),
                    h,
                    key_head_of(h // group, s),
                    chunk * QUERIES + count // TILE * TILE + u,
                    P[n],
                    s,
                    start,
                )

    return kernel


def over_cache(
    cached: CachedAttention,
    attention: Attention,
    q: Tensor,
    slopes: Tensor,
    config: MPTConfig,
    past: Past,
) -> Tensor:
    """Lower attention over a cache to the kernel."""
    kernel = cached_kernel(cached, attention, config, q.dtype, attention.scale(config))
    arguments = [q, past.keys, past.values, past.lengths, past.starts, slopes]
    return op.tensor_ir_op(
        kernel, "cached_attention", arguments, Tensor.placeholder(q.shape, q.dtype)
    )
