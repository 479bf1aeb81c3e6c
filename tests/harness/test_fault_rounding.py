"""The roundings that faults are made of, bit for bit, in the graph and inside a kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from harness.faults.rounding import through

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_rounded_to_nearest_even(dtype: str, lanes: int) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(4096).astype(np.float32) * 8
    # Ties, zeros, and what only just rounds up or down.
    exact = values[:1000].astype(ml_dtypes.bfloat16).astype(np.float32)
    half = (exact.view(np.uint32) + 0x8000).view(np.float32)
    values = np.concatenate([values, half, np.nextafter(half, 0), [0.0, -0.0, 1.0], exact])
    values = np.resize(values.astype(np.float32), -(-values.size // 16) * 16)
    size, function = values.size, through(dtype)

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, y: T.handle) -> None:
        X = T.match_buffer(x, (size,), "float32")
        Y = T.match_buffer(y, (size,), "float32")
        for i in range(size // lanes):
            if lanes == 1:
                Y[i] = function(X[i])
            else:
                Y[T.ramp(i * lanes, 1, lanes)] = function(X[T.ramp(i * lanes, 1, lanes)])

    built = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), "llvm")
    result = tvm.runtime.tensor(np.zeros_like(values))
    built["main"](tvm.runtime.tensor(values), result)
    expected = values.astype(DTYPES[dtype]).astype(np.float32)
    assert np.array_equal(result.numpy().view(np.uint32), expected.view(np.uint32))
