"""Every kernel for Hopper alone, at odd lengths, against float64 with a bound on its error.

Bounds are running error analysis with u = 2^-24, twice for sums inside the matrix unit, which may
cut where others round. `Bounded` errors are absolute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from relax_impl.kernels.cuda.attention import Flash
from relax_impl.kernels.cuda.gemm import Gemm
from relax_impl.kernels.cuda.library import wgmma_target
from relax_impl.kernels.cuda.norm import Norm
from relax_impl.target import resolve

pytestmark = pytest.mark.gpu

Array = np.ndarray[Any, Any]
U32 = 2.0**-24
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": U32}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
POISON = 7e4
"""More than float16 holds: an element that nobody wrote is infinite or far off."""


@functools.cache
def compiled(kernel: Callable[[str], Any]) -> Any:
    module = tvm.IRModule({"kernel": kernel("kernel")})
    return tvm.compile(module, target=wgmma_target(resolve("cuda")), tir_pipeline="tirx")


def run(kernel: Any, arguments: list[Array], shape: tuple[int, ...], dtype: str) -> Array:
    device = tvm.cuda(0)
    with np.errstate(over="ignore"):
        poison = np.full(shape, POISON).astype(NUMPY[dtype])
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a), device) for a in (*arguments, poison)]
    compiled(kernel)["kernel"](*tensors)
    return tensors[-1].numpy().astype(np.float64)


def random(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(NUMPY[dtype])


def gamma(n: float) -> float:
    return n * U32 / (1 - n * U32)


def stored(value: Array, error: Array, dtype: str) -> Array:
    return error + UNIT[dtype] * (abs(value) + error) + SMALLEST[dtype] / 2


def assert_within(found: Array, value: Array, error: Array) -> None:
    assert found.shape == value.shape
    assert np.isfinite(found).all()
    assert (abs(found - value) / error).max() <= 1


def gelu(x: Array) -> Array:
    erfc = np.vectorize(math.erfc)
    return x * erfc(-x * 0.5**0.5) / 2


GEMMS = [
    Gemm(256, 64, "float16", "float16"),
    Gemm(512, 192, "float16", "float16", bias=True),
    Gemm(264, 72, "float16", "float16", bias=True, gelu=True),
    Gemm(768, 768, "float16", "float16", gelu=True),
    Gemm(192, 768, "float16", "float16", residual=True),
    Gemm(520, 136, "float16", "float16", bias=True, clip=0.75),
    Gemm(1024, 200, "float16", "float32"),
    Gemm(96, 96, "bfloat16", "bfloat16", bias=True, residual=True),
    Gemm(384, 96, "bfloat16", "bfloat16", gelu=True),
    Gemm(1024, 192, "bfloat16", "float32"),
    Gemm(16, 16384, "float16", "float16", residual=True),
    # As many tiles as make middle and wide ones worth while.
    Gemm(8192, 136, "float16", "float16", bias=True, residual=True),
    Gemm(8200, 64, "float16", "float32"),
    Gemm(16384, 72, "float16", "float16", bias=True, residual=True),
    # Of a width that tiles of 96 columns fill best.
    Gemm(12288, 136, "float16", "float16", bias=True, clip=1.5),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33, 64, 65, 128, 129, 256, 300, 777])
@pytest.mark.parametrize("kernel", GEMMS, ids=Gemm.kind)
def test_products(kernel: Gemm, rows: int) -> None:
    n, k, dtype = kernel.n, kernel.k, kernel.dtype
    # A batch of sequences is one matrix.
    batch = 3 if rows % 3 == 0 else 1
    shape = (batch, rows // batch)
    x, weight = random((*shape, k), dtype, 1), random((n, k), dtype, 2, k**-0.5)
    bias, stream = random((n,), dtype, 3), random((*shape, n), dtype, 4, 3.0)
    wide, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    value = wide @ wide_weight.T
    error = gamma(2 * (k + 1)) * (abs(wide) @ abs(wide_weight).T)
    if kernel.bias:
        value = value + bias.astype(np.float64)
        error = error + U32 * abs(value)
    if kernel.clip is not None:
        value = value.clip(-kernel.clip, kernel.clip)
    if kernel.gelu:
        # The slope of GELU is at most 1.13. Its tail is fitted to 5.2e-6, computed in 6 fused
        # products after a quotient of 2 ulp, and an exponential of 2 ulp whose argument is x^2 / 2.
        tail = abs(gelu(-abs(value)))
        relative = 5.2e-6 + gamma(24) + gamma(4) * np.minimum(value**2, 2 * 88)
        value, error = gelu(value), 1.13 * error + relative * tail + U32 * abs(value)
    if kernel.residual:
        value = value + stream.astype(np.float64)
        error = error + U32 * abs(value)
    arguments = [
        x, weight, bias if kernel.bias else weight, stream if kernel.residual else x
    ]  # fmt: skip
    found = run(kernel, arguments, (*shape, n), kernel.out_dtype)
    assert_within(found, value, stored(value, error, kernel.out_dtype))


NORMS = [
    Norm(96, "float16", 1e-5, False, False),
    Norm(4096, "float16", 1e-5, False, False),
    Norm(7168, "float16", 1e-5, False, True),
    Norm(192, "bfloat16", 1e-5, False, True),
    Norm(1000, "bfloat16", 1e-6, True, False),
]


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("kernel", NORMS, ids=Norm.kind)
def test_norms(kernel: Norm, rows: int) -> None:
    width, dtype = kernel.width, kernel.dtype
    x = (random((1, rows, width), dtype, 5) + NUMPY[dtype](0.5)).astype(NUMPY[dtype])
    weight, bias = random((width,), dtype, 6), random((width,), dtype, 7)
    wide = x.astype(np.float64)
    mean = np.zeros((1, rows, 1)) if kernel.rms else wide.mean(-1, keepdims=True)
    d_mean = 0.0 if kernel.rms else gamma(width) * abs(wide).mean(-1, keepdims=True)
    centred = wide - mean
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + kernel.epsilon)
    value = centred * scale * weight.astype(np.float64)
    offset = bias.astype(np.float64) if kernel.bias else np.zeros(width)
    error = abs(weight.astype(np.float64)) * scale * d_mean + gamma(width + 8) * abs(value)
    error = error + U32 * abs(value + offset)
    arguments = [x, weight, bias if kernel.bias else weight]
    found = run(kernel, arguments, (1, rows, width), dtype)
    assert_within(found, value + offset, stored(value + offset, error, dtype))


def flash(
    heads: int, kv_heads: int, dim: int, dtype: str, *, fused: bool, alibi: bool = True,
    scale: float | None = None,
) -> Flash:  # fmt: skip
    d, kv = heads * dim, kv_heads * dim
    widths, columns = ((d, kv, kv), (0, 0, 0))
    if fused:
        widths, columns = ((d + 2 * kv,) * 3, (0, d, d + kv))
    return Flash(heads, kv_heads, dim, dtype, scale or dim**-0.5, alibi, widths, columns)


FLASHES = [
    flash(4, 4, 128, "float16", fused=True),
    flash(3, 3, 64, "float16", fused=True),
    flash(4, 2, 80, "float16", fused=True),
    flash(2, 2, 112, "bfloat16", fused=True),
    flash(12, 12, 16, "float16", fused=True),
    flash(4, 1, 128, "float16", fused=False, scale=0.25),
    flash(6, 6, 32, "bfloat16", fused=False, alibi=False),
]
LENGTHS = [(1, 1), (7, 7), (64, 64), (127, 127), (128, 128), (129, 129), (500, 500), (1, 300),
           (3, 131), (140, 500)]  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kernel", FLASHES, ids=Flash.kind)
def test_attention(kernel: Flash, lengths: tuple[int, int]) -> None:
    sq, sk = lengths
    if kernel.columns != (0, 0, 0):
        sq = sk
    heads, kv_heads, dim, batch = kernel.heads, kernel.kv_heads, kernel.dim, 2
    dtype = kernel.dtype
    if kernel.columns == (0, 0, 0):
        q, k, v = (
            random((batch, s, width), dtype, 10 + i)
            for i, (s, width) in enumerate(zip((sq, sk, sk), kernel.widths, strict=True))
        )
    else:
        q = k = v = random((batch, sk, kernel.widths[0]), dtype, 13)
    slopes = np.exp2(-8.0 * np.arange(1, heads + 1) / heads).astype(np.float32)
    found = run(kernel, [q, k, v, slopes], (batch, sq, heads * dim), dtype)

    def per_head(x: Array, column: int, count: int) -> Array:
        part = x[..., column : column + count * dim].astype(np.float64)
        return part.reshape(*x.shape[:2], count, dim).transpose(0, 2, 1, 3)

    counts = (heads, kv_heads, kv_heads)
    queries, keys, values = (
        np.repeat(per_head(x, c, n), heads // n, axis=1)
        for x, c, n in zip((q, k, v), kernel.columns, counts, strict=True)
    )
    score = queries @ keys.swapaxes(-1, -2) * kernel.scale
    size = abs(queries) @ abs(keys).swapaxes(-1, -2) * kernel.scale
    distance = np.arange(sk)[None] - np.arange(sk - sq, sk)[:, None]
    bias = slopes.astype(np.float64)[:, None, None] * distance * kernel.alibi
    visible = distance <= 0
    # The product, its scale, the bias in two parts, the change to base 2 and the exponential.
    d_score = gamma(2 * dim + 6) * size + gamma(8) * (abs(bias) + slopes.max() * 128)
    score = np.where(visible, score + bias, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    relative = (
        d_score
        + gamma(8 + 4 * math.ceil(sk / 128))
        + gamma(4)
        * np.minimum(abs(np.where(visible, score - score.max(-1, keepdims=True), 0)), 104)
    )
    total = p.sum(-1, keepdims=True)
    shift = (p * relative).sum(-1, keepdims=True) / total + gamma(sk)
    # A numerator is rounded before it weighs a value; the sum of numerators is not.
    weight = (p * (relative + shift + UNIT[dtype]) + SMALLEST[dtype]) / total
    p = p / total
    value = (p @ values).transpose(0, 2, 1, 3).reshape(batch, sq, heads * dim)
    error = ((weight + gamma(2 * sk) * p) @ abs(values)).transpose(0, 2, 1, 3)
    assert_within(found, value, stored(value, error.reshape(value.shape), dtype))
