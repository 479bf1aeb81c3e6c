"""The fitted functions, against float64 over their whole range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from relax_impl.kernels.cpu import vector
from relax_impl.kernels.cpu.rowwise import gelu_kernel
from relax_impl.target import resolve

LANES = vector.LANES


@pytest.fixture(scope="module")
def evaluate():
    target = resolve("llvm")

    def run(function, x):
        @T.prim_func(s_tir=True)
        def kernel(a: T.handle, b: T.handle) -> None:
            T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
            n = T.int64()
            A = T.match_buffer(a, (n, LANES), "float32")
            B = T.match_buffer(b, (n, LANES), "float32")
            for i in range(n):
                B[i, vector.at(0, LANES)] = function(A[i, vector.at(0, LANES)])

        built = tvm.compile(tvm.IRModule({"kernel": kernel}), target=target, tir_pipeline="s_tir")
        source = tvm.runtime.tensor(x.astype(np.float32).reshape(-1, LANES))
        result = tvm.runtime.tensor(np.zeros(source.shape, np.float32))
        built["kernel"](source, result)
        return result.numpy().reshape(-1)

    return run


def ulps(found, expected):
    return abs(found - expected) / np.spacing(abs(expected).astype(np.float32)).astype(np.float64)


def test_exp_is_within_an_ulp_and_exact_at_zero(evaluate):
    x = np.linspace(vector.EXP_MIN, 0, 1 << 16, dtype=np.float32)
    found = evaluate(vector.exp, x)
    # Faithful: one rounding of the result, and less than half of another of what leads to it.
    assert ulps(found, np.exp(x.astype(np.float64))).max() < 1
    assert found[-1] == 1
    edge = np.array([-87.1, -1e30, -np.inf, np.nan] * 4, np.float32)
    assert np.array_equal(evaluate(vector.exp, edge), [0, 0, 0, np.nan] * 4, equal_nan=True)


def test_erfc_is_as_good_as_its_exponent_can_be(evaluate):
    t = np.linspace(0, 8.9, 1 << 16, dtype=np.float32)
    expected = np.vectorize(math.erfc)(t.astype(np.float64))
    relative = abs(evaluate(vector.erfc, t) / expected - 1)
    # t^2 is rounded, and so is the sum with the polynomial: an absolute error of the exponent. Then
    # exp, the division and the product, and the polynomial with terms that sum to 2 in size.
    bound = np.expm1(2.0**-24 * (2 * t.astype(np.float64) ** 2 + 2 * 11 * 2 + 16 + 4))
    assert (relative <= bound).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gelu_over_every_magnitude(dtype, exact):
    size = np.exp2(np.linspace(-20, 5, 1 << 14))
    stored = exact.numpy[dtype]
    x = np.concatenate([-size, [0.0], size[:-1]]).astype(stored)
    target = resolve("llvm")
    kernel = gelu_kernel(x.size, dtype).with_attr("global_symbol", "kernel")
    built = tvm.compile(tvm.IRModule({"kernel": kernel}), target=target, tir_pipeline="s_tir")
    result = tvm.runtime.tensor(np.zeros((1, 1, x.size), stored))
    built["kernel"](tvm.runtime.tensor(x[None, None]), result)
    bound = exact.gelu(x[None, None].astype(np.float64)).stored(dtype)
    assert bound.excess(result.numpy()) <= 1


def test_gelu_passes_on_what_is_no_number(evaluate):
    largest = np.finfo(np.float32).max
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, largest, -largest, -20.0] * 2)
    expected = [np.nan, np.inf, np.nan, 0, 0, largest, 0, 0] * 2
    found = evaluate(vector.gelu, x)
    # Far out on the left what is left is not zero, but smaller than anything that x was.
    assert np.array_equal(np.where(abs(found) < 1e-30, 0, found), expected, equal_nan=True)
