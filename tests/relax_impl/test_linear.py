"""The matrix kernel for processors: every height of tile, panels that are not full, no rows."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from relax_impl.kernels.cpu.linear import BLOCK, SLICE, TILE, linear_kernel
from relax_impl.kernels.parsing import quick_inlining
from relax_impl.layout import PANELS
from relax_impl.target import resolve, wide_vectors

CASES = {
    "panels that are full": (64, SLICE, "float32", False),
    "a last panel and a last slice that are not, an odd number of panels": (
        33,
        SLICE + 9,
        "float16",
        True,
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """Return a function from x (b, s, columns) to the kernel's product, the weight and the bias."""
    rows, columns, dtype, has_bias = request.param
    target = resolve("llvm")
    with target, quick_inlining():
        kernel = linear_kernel(rows, columns, dtype, dtype, has_bias, wide_vectors())
    module = tvm.IRModule({"product": kernel.with_attr("global_symbol", "product")})
    product = tvm.compile(module, target=target, tir_pipeline="s_tir")["product"]
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns)).astype(dtype)
    bias = random.standard_normal(rows).astype(dtype) if has_bias else None
    held = [tvm.runtime.tensor(a) for a in (PANELS.store(weight), bias) if a is not None]

    def run(x: np.ndarray) -> np.ndarray:
        y = tvm.runtime.tensor(np.full((*x.shape[:2], rows), np.nan, dtype))
        product(tvm.runtime.tensor(x), *held, y)
        return y.numpy()

    return run, weight, bias


def inputs(weight: np.ndarray, batch: int, length: int) -> np.ndarray:
    random = np.random.default_rng(length)
    return random.standard_normal((batch, length, weight.shape[1])).astype(weight.dtype)


def test_every_sum_is_within_the_error_of_a_sum(case):
    run, weight, bias = case
    x = inputs(weight, 3, 7)
    # |error| <= n u sum |x w| / (1 - n u) for n roundings, and one rounding to the storage dtype.
    wide, w = x.astype(np.float64), weight.astype(np.float64)
    added = 0 if bias is None else bias.astype(np.float64)
    exact, size = wide @ w.T + added, abs(wide) @ abs(w).T + abs(added)
    n = (weight.shape[1] + 1) * np.finfo(np.float32).eps / 2
    summed = n / (1 - n) * size
    unit = np.finfo(weight.dtype)
    rounded = (abs(exact) + summed) * float(unit.eps) / 2 + float(unit.smallest_subnormal)
    assert (abs(run(x).astype(np.float64) - exact) <= summed + rounded).all()


@pytest.mark.parametrize("length", [*range(1, 2 * TILE), BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_row_has_the_same_bits_among_any_number_of_rows(case, length):
    run, weight, _ = case
    x = inputs(weight, 1, length)
    alone = np.concatenate([run(x[:, i : i + 1]) for i in range(length)], axis=1)
    assert run(x).tobytes() == alone.tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_rows_give_no_rows(case, shape):
    run, weight, _ = case
    assert run(inputs(weight, *shape)).shape == (*shape, weight.shape[0])
