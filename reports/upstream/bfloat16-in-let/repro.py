"""A bfloat16 read inside the value of a ``Let`` is converted as the integer of its bits.

    python repro.py

Both kernels store 1.0 * x, for x = 1, 2, 3 and 4; the second gives the converted element a name.
"""

import ml_dtypes
import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T


def plain(x):
    """Convert to float32."""
    return T.Cast("float32", x)


def named(x):
    """Convert to float32 under a name."""
    variable = tirx.Var("v", "float32")
    return tirx.Let(variable, T.Cast("float32", x), variable * T.float32(1))


def run(function):
    """Compile for the default processor and run on four elements."""

    @T.prim_func(s_tir=True)
    def kernel(a: T.handle, b: T.handle):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        A = T.match_buffer(a, (4,), "bfloat16")
        B = T.match_buffer(b, (4,), "float32")
        for i in range(4):
            B[i] = function(A[i])

    built = tvm.compile(tvm.IRModule({"kernel": kernel}), target="llvm", tir_pipeline="s_tir")
    out = tvm.runtime.tensor(np.zeros(4, np.float32))
    built["kernel"](tvm.runtime.tensor(np.arange(1, 5).astype(ml_dtypes.bfloat16)), out)
    return out.numpy()


print("TVM", tvm.__version__)
print("plain:", run(plain))
print("named:", run(named))
