"""The matrix unit adds as the declared accumulator says: cut towards zero every 16 products."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm

from reference.arithmetic import product
from reference.orders import Order
from relax_impl.kernels.cuda.gemm import Gemm
from relax_impl.kernels.cuda.library import wgmma_target
from relax_impl.target import resolve

pytestmark = pytest.mark.gpu

Array = np.ndarray[Any, Any]
TERMS, PLACES = 16, 25
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def imitated(a: Array, b: Array) -> Array:
    """Sum as the unit does: addends cut `PLACES` below the largest exponent, then their sum."""
    total = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], TERMS):
        x, y = a[:, None, start : start + TERMS], b[None, :, start : start + TERMS]
        addends = np.concatenate([x * y, total[..., None]], axis=-1)
        # A product that is not normalised has the exponents of its factors.
        exponents = [np.frexp(x)[1] + np.frexp(y)[1] - 2, np.frexp(total)[1][..., None] - 1]
        zero = np.concatenate([x * y == 0, total[..., None] == 0], axis=-1)
        largest = np.where(zero, -400, np.concatenate(exponents, axis=-1)).max(-1, keepdims=True)
        quantum = np.ldexp(1.0, largest - PLACES)
        wide = (np.trunc(addends / quantum) * quantum).sum(axis=-1)
        total = (wide.view(np.int64) & -(1 << 29)).view(np.float64)
    return total


def on_device(a: Array, b: Array, dtype: str) -> Array:
    kernel = Gemm(len(b), a.shape[1], dtype, "float32")
    module = tvm.IRModule({"kernel": kernel("kernel")})
    built = tvm.compile(module, target=wgmma_target(resolve("cuda")), tir_pipeline="tirx")
    device = tvm.cuda(0)
    x, weight = (tvm.runtime.tensor(t, device) for t in (a[None], b))
    out = tvm.runtime.tensor(np.full((1, len(a), len(b)), np.nan, np.float32), device)
    built["kernel"](x, weight, weight, x, out)
    return out.numpy()[0].astype(np.float64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spread", [0, 6])
def test_sums_have_the_bits_of_the_imitation(dtype: str, spread: int) -> None:
    # Below 1024 terms no two blocks share a sum.
    random = np.random.default_rng(spread)
    pair = [
        (random.standard_normal((n, 960)) * np.exp2(random.integers(-spread, spread + 1, (n, 960))))
        .astype(NUMPY[dtype]) for n in (24, 64)
    ]  # fmt: skip
    found, (a, b) = on_device(*pair, dtype), (t.astype(np.float64) for t in pair)
    assert np.array_equal(found, imitated(a, b))


def test_the_declared_order_loses_what_the_unit_loses_and_a_third_more() -> None:
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((n, 960)).astype(np.float16) for n in (128, 512))
    exact = a.astype(np.float64) @ b.astype(np.float64).T

    def lost(found: Array) -> float:
        return 1 - float((found * exact).sum() / np.square(exact).sum())

    x, y = (torch.from_numpy(t.astype(np.float32)) for t in (a, b))
    order = product(x, y.T, Order("cut", accumulator="float32_cut")).numpy().astype(np.float64)
    device = lost(on_device(a, b, "float16"))
    # Multiples of a quarter of a unit lose three eighths of one on average, any numbers a half.
    assert 0.7 < device / lost(order) < 0.85
