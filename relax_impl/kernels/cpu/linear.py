"""Matrix product with panels of weights: float32 accumulators in registers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from relax_impl.kernels.cpu.vector import LANES, at, narrow, splat, spread, widen

TILE = 6
"""Rows of x per register tile."""
BLOCK = 132
"""Most rows of x per task, a multiple of TILE: with one group of panels they fit L2."""
GROUP = 4
"""Panels per task."""
SLICE = 512
"""Features of a panel that all tiles of a task use before the next: 32 KB in float32."""


def linear_kernel(
    rows: int, columns: int, dtype: str, out_dtype: str, has_bias: bool, wide: bool
) -> tirx.PrimFunc:
    """Product of x (b, s, columns) and a transposed weight, plus a bias, as (b, s, rows).

    Matrices of as many columns share a kernel: the number of rows is an argument and only decides
    how many panels a register tile may take.
    """
    panels = -(-rows // LANES)
    # Panels side by side in a tile: what the registers hold, and divides the number of panels.
    pair = math.gcd(panels, 2 if wide else 1)
    tall = math.gcd(panels, GROUP if wide else 1)
    few = math.gcd(panels, GROUP if wide else 2)
    ragged = rows % LANES != 0
    return _kernel(columns, dtype, out_dtype, has_bias, (pair, tall, few), ragged)


@cache
def _kernel(
    columns: int,
    dtype: str,
    out_dtype: str,
    has_bias: bool,
    widths: tuple[int, int, int],
    ragged: bool,
) -> tirx.PrimFunc:
    """Matrix product with tiles of 6 rows by `pair` panels, for the rest 4 by `tall`, 2 by `few`.

    The weight is stored in panels, [ceil(rows / 16), columns, 16]. A register tile is 6 rows of x
    by 16 output features, or by 32 where vectors are 512 bits wide: either way 12 independent sums,
    enough to hide the latency of a multiply-add. Rows left over get flatter and wider tiles. No sum
    is ever split: a row's result does not depend on how many rows there are, bit for bit. x is
    converted to float32 once, the weight in registers; the accumulator is rounded once, at the end.

    `columns` is a constant because it is the stride of x: as an argument it costs the innermost
    loop an addition for every row of the tile. `ragged` says whether the last panel is partly
    padding: only then may a sum leave the registers lane by lane, and it does so through memory.
    """
    pair, tall, few = widths
    staged = dtype != "float32"
    slices = -(-columns // SLICE)

    # Plain functions rather than T.inline where an expression is enough: each use of T.inline costs
    # the parser 30 ms.
    def product(acc: Any, slot: Any, A: Any, W: Any, i: Any, n: Any, k: Any) -> Any:
        weight = widen(W[n, k, at(0, LANES)])
        return T.fma(spread(A[i, k], LANES), weight, acc[at(slot * LANES, LANES)])

    def vector(acc: Any, slot: Any, B: Any, n: Any) -> Any:
        total = acc[at(slot * LANES, LANES)]
        return narrow(total + widen(B[at(n * LANES, LANES)]) if has_bias else total, out_dtype)

    def scalar(acc: Any, slot: Any, B: Any, n: Any, q: Any) -> Any:
        total = acc[slot * LANES + q]
        return narrow(total + widen(B[n * LANES + q]) if has_bias else total, out_dtype)

    def is_full(rows: Any, n: Any) -> Any:
        return n * LANES + LANES <= rows if ragged else True

    @T.inline
    def start(acc: Any, count: Any) -> None:
        for t in T.unroll(count):
            acc[at(t * LANES, LANES)] = splat(0.0, LANES)

    @T.inline
    def add(
        mr: Any, np: Any, acc: Any, begin: Any, end: Any, A: Any, W: Any, i: Any, n: Any
    ) -> None:
        for k in range(end - begin):
            for r in T.unroll(mr):
                for p in T.unroll(np):
                    acc[at((r * np + p) * LANES, LANES)] = product(
                        acc, r * np + p, A, W, i + r, n + p, begin + k
                    )

    @T.inline
    def finish(mr: Any, np: Any, rows: Any, acc: Any, B: Any, Y: Any, i: Any, n: Any) -> None:
        for r in T.unroll(mr):
            for p in T.unroll(np):
                if is_full(rows, n + p):
                    Y[i + r, at((n + p) * LANES, LANES)] = vector(acc, r * np + p, B, n + p)
                else:
                    # The last panel, where it is partly padding.
                    for q in range(rows % LANES):
                        Y[i + r, (n + p) * LANES + q] = scalar(acc, r * np + p, B, n + p, q)

    @T.inline
    def tile(mr: Any, np: Any, rows: Any, A: Any, W: Any, B: Any, Y: Any, i: Any, n: Any) -> None:
        acc = T.alloc_buffer((mr * np * LANES,), "float32", scope="local")
        start(acc, mr * np)
        add(mr, np, acc, T.int64(0), columns, A, W, i, n)
        finish(mr, np, rows, acc, B, Y, i, n)

    @T.inline
    def whole(count: Any, rows: Any, A: Any, W: Any, B: Any, Y: Any, i: Any, n: Any) -> None:
        # Sums wait here while the next slice of the panels is in the nearest cache.
        part = T.alloc_buffer((BLOCK // TILE, TILE * pair * LANES), "float32", scope="local")
        for s in range(slices):
            for v in range(count):
                acc = T.alloc_buffer((TILE * pair * LANES,), "float32", scope="local")
                if s == 0:
                    start(acc, TILE * pair)
                else:
                    for t in T.unroll(TILE * pair):
                        acc[at(t * LANES, LANES)] = part[v, at(t * LANES, LANES)]
                end = T.min((s + 1) * SLICE, columns)
                add(TILE, pair, acc, s * SLICE, end, A, W, i + v * TILE, n)
                if s == slices - 1:
                    finish(TILE, pair, rows, acc, B, Y, i + v * TILE, n)
                else:
                    for t in T.unroll(TILE * pair):
                        part[v, at(t * LANES, LANES)] = acc[at(t * LANES, LANES)]

    @T.inline
    def multiply(m: Any, rows: Any, A: Any, W: Any, B: Any, Y: Any) -> None:
        panels = (rows + LANES - 1) // LANES
        groups = (panels + GROUP - 1) // GROUP
        # One where there are no rows: the size is a quotient by it.
        blocks = T.max((m + BLOCK - 1) // BLOCK, T.int64(1))
        # Blocks as equal as whole tiles allow.
        size = (m + blocks * TILE - 1) // (blocks * TILE) * TILE
        for t in T.parallel(blocks * groups):
            n = t // blocks * GROUP
            i = t % blocks * size
            count = T.max(T.min(size, m - i), T.int64(0))
            here = T.min(T.int64(GROUP), panels - n)
            # 1 to 5 rows are left over: tiles of 4, 2 and 1, while the panel is near.
            rest = count % TILE
            j = i + count - rest
            for u in range(here // few):
                for p in range(few // pair):
                    whole(count // TILE, rows, A, W, B, Y, i, n + u * few + p * pair)
                if rest >= 4:
                    for p in range(few // tall):
                        tile(4, tall, rows, A, W, B, Y, j, n + u * few + p * tall)
                if rest % 4 >= 2:
                    tile(2, few, rows, A, W, B, Y, j + rest // 4 * 4, n + u * few)
                if rest % 2 == 1:
                    tile(1, few, rows, A, W, B, Y, j + rest - 1, n + u * few)

    @T.inline
    def body(m: Any, rows: Any, X: Any, W: Any, B: Any, Y: Any) -> None:
        if staged:
            A = T.alloc_buffer((m, columns), "float32")
            for i in T.parallel(m):
                for p in range(columns // LANES):
                    A[i, at(p * LANES, LANES)] = widen(X[i, at(p * LANES, LANES)])
                for k in range(columns % LANES):
                    A[i, columns // LANES * LANES + k] = widen(X[i, columns // LANES * LANES + k])
            multiply(m, rows, A, W, B, Y)
        else:
            multiply(m, rows, X, W, B, Y)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def with_bias(x: T.handle, w: T.handle, offset: T.handle, y: T.handle) -> None:
            T.func_attr({"tirx.noalias": True})
            b, s, rows, panels = T.int64(), T.int64(), T.int64(), T.int64()
            X = T.match_buffer(x, (b, s, columns), dtype)
            W = T.match_buffer(w, (panels, columns, LANES), dtype)
            B = T.match_buffer(offset, (rows,), dtype)
            Y = T.match_buffer(y, (b, s, rows), out_dtype)
            flat_x = T.decl_buffer((b * s, columns), dtype, data=X.data)
            flat_y = T.decl_buffer((b * s, rows), out_dtype, data=Y.data)
            body(b * s, rows, flat_x, W, B, flat_y)

        return with_bias

    @T.prim_func(private=True, s_tir=True)
    def without_bias(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s, rows, panels = T.int64(), T.int64(), T.int64(), T.int64()
        X = T.match_buffer(x, (b, s, columns), dtype)
        W = T.match_buffer(w, (panels, columns, LANES), dtype)
        Y = T.match_buffer(y, (b, s, rows), out_dtype)
        flat_x = T.decl_buffer((b * s, columns), dtype, data=X.data)
        flat_y = T.decl_buffer((b * s, rows), out_dtype, data=Y.data)
        body(b * s, rows, flat_x, W, W, flat_y)

    return without_bias
