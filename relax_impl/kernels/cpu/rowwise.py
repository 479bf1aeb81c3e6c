"""Kernels that handle one row at a time: norms and GELU."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from relax_impl.kernels.cpu.vector import LANES, at, gelu, narrow, splat, spread, widen


@cache
def gelu_kernel(width: int, dtype: str) -> tirx.PrimFunc:
    """GELU of (m, width), in float32 and rounded once."""
    whole = width // LANES

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        X = T.match_buffer(x, (m, width), dtype)
        Y = T.match_buffer(y, (m, width), dtype)
        # A block of its own: Relax looks into every function that could be a reshape.
        with T.sblock("gelu"):
            for i in T.parallel(m):
                for p in range(whole):
                    j = p * LANES
                    Y[i, at(j, LANES)] = narrow(gelu(widen(X[i, at(j, LANES)])), dtype)
                for j in range(width - whole * LANES):
                    Y[i, whole * LANES + j] = narrow(gelu(widen(X[i, whole * LANES + j])), dtype)

    return kernel


@cache
def norm_kernel(
    width: int, dtype: str, epsilon: float, is_rms: bool, has_bias: bool
) -> tirx.PrimFunc:
    """Layer norm or RMS norm of (m, width), in float32 with one rounding.

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

    @T.prim_func(private=True, s_tir=True)
    def with_bias(x: T.handle, g: T.handle, b: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        X = T.match_buffer(x, (m, width), dtype)
        G = T.match_buffer(g, (width,), dtype)
        B = T.match_buffer(b, (width,), dtype)
        Y = T.match_buffer(y, (m, width), dtype)
        body(m, X, G, B, Y)

    @T.prim_func(private=True, s_tir=True)
    def without_bias(x: T.handle, g: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        X = T.match_buffer(x, (m, width), dtype)
        G = T.match_buffer(g, (width,), dtype)
        Y = T.match_buffer(y, (m, width), dtype)
        body(m, X, G, G, Y)

    return with_bias if has_bias else without_bias
