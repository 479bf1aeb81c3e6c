"""Matrix product with panels of weights: float32 accumulators in registers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from relax_impl.kernels.cpu.vector import LANES, at, narrow, splat, spread, widen

TILE_ROWS = 6
"""Rows of x per register tile."""
BLOCK_ROWS = 96
"""Rows of x per task, a multiple of TILE_ROWS: together with one group of panels they fit L2."""
GROUP = 4
"""Panels per task."""


@lru_cache(maxsize=None)
def linear_kernel(
    rows: int, columns: int, dtype: str, out_dtype: str, has_bias: bool, wide: bool
) -> tirx.PrimFunc:
    """x (m, columns) times the transposed weight, plus the bias, to (m, rows).

    The weight is stored in panels, [ceil(rows / 16), columns, 16]. A register tile is 6 rows of x by
    16 output features, or 32 where vectors are 512 bits wide (`wide`): on either kind of register
    that is 12 independent sums, enough to hide the latency of a multiply-add. Rows left over get a
    tile of their own size, with the sum over the columns split to keep as many sums in flight.
    x is converted to float32 once, the weight in registers.
    """
    panels = -(-rows // LANES)
    pair = 2 if wide else 1
    groups = -(-panels // GROUP)
    whole = rows // LANES
    last = rows - whole * LANES
    staged = dtype != "float32"

    @T.inline
    def store(Y: Any, B: Any, acc: Any, slot: Any, i: Any, n: Any) -> None:
        # `n` is the panel; the last one may be partly padding.
        if has_bias:
            if n < whole:
                Y[i, at(n * LANES, LANES)] = narrow(
                    acc[at(slot * LANES, LANES)] + widen(B[at(n * LANES, LANES)]), out_dtype
                )
            else:
                for q in range(last):
                    Y[i, n * LANES + q] = narrow(
                        acc[slot * LANES + q] + widen(B[n * LANES + q]), out_dtype
                    )
        else:
            if n < whole:
                Y[i, at(n * LANES, LANES)] = narrow(acc[at(slot * LANES, LANES)], out_dtype)
            else:
                for q in range(last):
                    Y[i, n * LANES + q] = narrow(acc[slot * LANES + q], out_dtype)

    @T.inline
    def tile(mr: Any, np: Any, split: Any, A: Any, W: Any, B: Any, Y: Any, i: Any, n: Any) -> None:
        acc = T.alloc_buffer((split * mr * np * LANES,), "float32", scope="local")
        for t in T.unroll(split * mr * np):
            acc[at(t * LANES, LANES)] = splat(0.0, LANES)
        for k in range(columns // split):
            for c in T.unroll(split):
                for r in T.unroll(mr):
                    for p in T.unroll(np):
                        acc[at(((c * mr + r) * np + p) * LANES, LANES)] = T.fma(
                            spread(A[i + r, k * split + c], LANES),
                            widen(W[n + p, k * split + c, at(0, LANES)]),
                            acc[at(((c * mr + r) * np + p) * LANES, LANES)],
                        )
        for k in range(columns % split):
            for r in T.unroll(mr):
                for p in T.unroll(np):
                    acc[at((r * np + p) * LANES, LANES)] = T.fma(
                        spread(A[i + r, columns // split * split + k], LANES),
                        widen(W[n + p, columns // split * split + k, at(0, LANES)]),
                        acc[at((r * np + p) * LANES, LANES)],
                    )
        for c in T.unroll(split - 1):
            for t in T.unroll(mr * np):
                acc[at(t * LANES, LANES)] = (
                    acc[at(t * LANES, LANES)] + acc[at(((c + 1) * mr * np + t) * LANES, LANES)]
                )
        for r in T.unroll(mr):
            for p in T.unroll(np):
                store(Y, B, acc, r * np + p, i + r, n + p)

    @T.inline
    def row_block(np: Any, A: Any, W: Any, B: Any, Y: Any, i: Any, count: Any, n: Any) -> None:
        for t in range(count // TILE_ROWS):
            tile(TILE_ROWS, np, 1, A, W, B, Y, i + t * TILE_ROWS, n)
        rest = count % TILE_ROWS
        j = i + count - rest
        if rest == 1:
            tile(1, np, 4, A, W, B, Y, j, n)
        elif rest == 2:
            tile(2, np, 3, A, W, B, Y, j, n)
        elif rest == 3:
            tile(3, np, 2, A, W, B, Y, j, n)
        elif rest == 4:
            tile(4, np, 1, A, W, B, Y, j, n)
        elif rest == 5:
            tile(5, np, 1, A, W, B, Y, j, n)

    @T.inline
    def product(m: Any, A: Any, W: Any, B: Any, Y: Any) -> None:
        blocks = (m + BLOCK_ROWS - 1) // BLOCK_ROWS
        for t in T.parallel(blocks * groups):
            g = t // blocks
            i = t % blocks * BLOCK_ROWS
            count = T.min(T.int64(BLOCK_ROWS), m - i)
            here = T.min(T.int64(GROUP), panels - g * GROUP)
            for u in range(here // pair):
                row_block(pair, A, W, B, Y, i, count, g * GROUP + u * pair)
            if here % pair == 1:
                row_block(1, A, W, B, Y, i, count, g * GROUP + here - 1)

    @T.inline
    def body(m: Any, X: Any, W: Any, B: Any, Y: Any) -> None:
        if staged:
            A = T.alloc_buffer((m, columns), "float32")
            for i in T.parallel(m):
                for p in range(columns // LANES):
                    A[i, at(p * LANES, LANES)] = widen(X[i, at(p * LANES, LANES)])
                for k in range(columns % LANES):
                    A[i, columns // LANES * LANES + k] = widen(X[i, columns // LANES * LANES + k])
            product(m, A, W, B, Y)
        else:
            product(m, X, W, B, Y)

    @T.prim_func(private=True, s_tir=True)
    def with_bias(x: T.handle, w: T.handle, b: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        X = T.match_buffer(x, (m, columns), dtype)
        W = T.match_buffer(w, (panels, columns, LANES), dtype)
        B = T.match_buffer(b, (rows,), dtype)
        Y = T.match_buffer(y, (m, rows), out_dtype)
        body(m, X, W, B, Y)

    @T.prim_func(private=True, s_tir=True)
    def without_bias(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        X = T.match_buffer(x, (m, columns), dtype)
        W = T.match_buffer(w, (panels, columns, LANES), dtype)
        Y = T.match_buffer(y, (m, rows), out_dtype)
        body(m, X, W, W, Y)

    return with_bias if has_bias else without_bias
