"""Kernels that handle one row at a time: norms, GELU and the residual sum."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from relax_impl.kernels.cpu.vector import LANES, at, gelu, narrow, splat, spread, widen


@cache
def gelu_kernel(width: int, dtype: str) -> tirx.PrimFunc:
    """GELU of (b, s, width), in float32 and rounded once."""
    whole = width // LANES

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s = T.int64(), T.int64()
        X = T.match_buffer(x, (b, s, width), dtype)
        Y = T.match_buffer(y, (b, s, width), dtype)
        # A block of its own: Relax looks into every function that could be a reshape.
        with T.sblock("gelu"):
            for t in T.parallel(b * s):
                n, i = t // s, t % s
                # Through a buffer: TVM reads a bfloat16 within an expression that names its parts
                # as the integer of its bits.
                wide = T.alloc_buffer((LANES,), "float32", scope="local")
                for p in range(whole):
                    wide[at(0, LANES)] = widen(X[n, i, at(p * LANES, LANES)])
                    Y[n, i, at(p * LANES, LANES)] = narrow(gelu(wide[at(0, LANES)]), dtype)
                for j in range(width - whole * LANES):
                    wide[0] = widen(X[n, i, whole * LANES + j])
                    Y[n, i, whole * LANES + j] = narrow(gelu(wide[0]), dtype)

    return kernel


@cache
def norm_kernel(
    width: int, dtype: str, epsilon: float, is_rms: bool, has_bias: bool
) -> tirx.PrimFunc:
    """Layer norm or RMS norm of (b, s, width), in float32 with one rounding.

    Mean first, then the squares around it. Sums run in 16 lanes, which are added at the end.
    """
    whole = width // LANES
    rest = width - whole * LANES
    start = whole * LANES
    centred = not is_rms

    @T.inline
    def total(result: Any, part: Any) -> None:
        result[0] = T.float32(0)
        for q in T.unroll(LANES):
            result[0] = result[0] + part[q]

    @T.inline
    def body(m: Any, X: Any, G: Any, B: Any, Y: Any) -> None:
        for i in T.parallel(m):
            part = T.alloc_buffer((LANES,), "float32", scope="local")
            total_ = T.alloc_buffer((1,), "float32", scope="local")
            mean = T.alloc_buffer((1,), "float32", scope="local")
            mean[0] = T.float32(0)
            if centred:
                part[at(0, LANES)] = splat(0.0, LANES)
                for p in range(whole):
                    part[at(0, LANES)] = part[at(0, LANES)] + widen(X[i, at(p * LANES, LANES)])
                for j in range(rest):
                    part[j] = part[j] + widen(X[i, start + j])
                total(total_, part)
                mean[0] = total_[0] / T.float32(width)
            part[at(0, LANES)] = splat(0.0, LANES)
            for p in range(whole):
                d = widen(X[i, at(p * LANES, LANES)]) - spread(mean[0], LANES)
                part[at(0, LANES)] = T.fma(d, d, part[at(0, LANES)])
            for j in range(rest):
                e = widen(X[i, start + j]) - mean[0]
                part[j] = T.fma(e, e, part[j])
            total(total_, part)
            scale = T.float32(1) / T.sqrt(total_[0] / T.float32(width) + T.float32(epsilon))
            for p in range(whole):
                g = widen(X[i, at(p * LANES, LANES)]) - spread(mean[0], LANES)
                h = g * spread(scale, LANES) * widen(G[at(p * LANES, LANES)])
                if has_bias:
                    Y[i, at(p * LANES, LANES)] = narrow(h + widen(B[at(p * LANES, LANES)]), dtype)
                else:
                    Y[i, at(p * LANES, LANES)] = narrow(h, dtype)
            for j in range(rest):
                s = (widen(X[i, start + j]) - mean[0]) * scale * widen(G[start + j])
                if has_bias:
                    Y[i, start + j] = narrow(s + widen(B[start + j]), dtype)
                else:
                    Y[i, start + j] = narrow(s, dtype)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def with_bias(x: T.handle, g: T.handle, offset: T.handle, y: T.handle) -> None:
            T.func_attr({"tirx.noalias": True})
            b, s = T.int64(), T.int64()
            X = T.match_buffer(x, (b, s, width), dtype)
            G = T.match_buffer(g, (width,), dtype)
            B = T.match_buffer(offset, (width,), dtype)
            Y = T.match_buffer(y, (b, s, width), dtype)
            flat_x = T.decl_buffer((b * s, width), dtype, data=X.data)
            flat_y = T.decl_buffer((b * s, width), dtype, data=Y.data)
            body(b * s, flat_x, G, B, flat_y)

        return with_bias

    @T.prim_func(private=True, s_tir=True)
    def without_bias(x: T.handle, g: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s = T.int64(), T.int64()
        X = T.match_buffer(x, (b, s, width), dtype)
        G = T.match_buffer(g, (width,), dtype)
        Y = T.match_buffer(y, (b, s, width), dtype)
        flat_x = T.decl_buffer((b * s, width), dtype, data=X.data)
        flat_y = T.decl_buffer((b * s, width), dtype, data=Y.data)
        body(b * s, flat_x, G, G, flat_y)

    return without_bias


@cache
def residual_kernel(width: int, dtype: str) -> tirx.PrimFunc:
    """Sum of two (b, s, width), in float32 and rounded once."""
    whole = width // LANES

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, u: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, s = T.int64(), T.int64()
        X = T.match_buffer(x, (b, s, width), dtype)
        U = T.match_buffer(u, (b, s, width), dtype)
        Y = T.match_buffer(y, (b, s, width), dtype)
        for t in T.parallel(b * s):
            n, i = t // s, t % s
            for p in range(whole):
                Y[n, i, at(p * LANES, LANES)] = narrow(
                    widen(X[n, i, at(p * LANES, LANES)]) + widen(U[n, i, at(p * LANES, LANES)]),
                    dtype,
                )
            for j in range(width - whole * LANES):
                Y[n, i, whole * LANES + j] = narrow(
                    widen(X[n, i, whole * LANES + j]) + widen(U[n, i, whole * LANES + j]), dtype
                )

    return kernel
