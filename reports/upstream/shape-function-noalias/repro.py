"""One function without ``tirx.noalias`` takes it from every other function of an LLVM module.

    TVM_NUM_THREADS=1 python repro.py

The same matrix product, compiled three times: alone through ``tvm.compile`` of a TIR module; in a
Relax module with a symbolic dimension, for which VMShapeLower adds ``shape_func``; and in the same
Relax module with the attribute added to that function.
"""

import time

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T

N = K = 512
TARGET = tvm.target.Target(
    {"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")()}
)


@T.prim_func(private=True, s_tir=True)
def gemm(x: T.handle, w: T.handle, y: T.handle):
    T.func_attr({"tirx.noalias": True})
    m = T.int64()
    X = T.match_buffer(x, (m, K), "float32")
    W = T.match_buffer(w, (N // 16, K, 16), "float32")
    Y = T.match_buffer(y, (m, N), "float32")
    for n in T.serial(N // 16):
        for i in range(m // 6):
            acc = T.alloc_buffer((96,), "float32", scope="local")
            for r in T.unroll(6):
                acc[T.ramp(r * 16, 1, 16)] = T.broadcast(T.float32(0), 16)
            for k in range(K):
                for r in T.unroll(6):
                    acc[T.ramp(r * 16, 1, 16)] = (
                        acc[T.ramp(r * 16, 1, 16)]
                        + T.broadcast(X[i * 6 + r, k], 16) * W[n, k, T.ramp(0, 1, 16)]
                    )
            for r in T.unroll(6):
                Y[i * 6 + r, T.ramp(n * 16, 1, 16)] = acc[T.ramp(r * 16, 1, 16)]


@tvm.transform.module_pass(opt_level=0, name="NoAlias")
def no_alias(module, _):
    """Name the functions without the attribute, and add it."""
    for name, function in list(module.functions_items()):
        if isinstance(function, tvm.tirx.PrimFunc) and "tirx.noalias" not in function.attrs:
            print("   without tirx.noalias:", name.name_hint)
            module[name] = function.with_attr("tirx.noalias", True)
    return module


def relax_module():
    """Return a function of one call, with a symbolic number of rows."""
    m = tvm.tirx.Var("m", "int64")
    x = relax.Var("x", relax.TensorType((m, K), "float32"))
    w = relax.Var("w", relax.TensorType((N // 16, K, 16), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            kernel = builder.add_func(gemm, "gemm")
            out = relax.TensorType((m, N), "float32")
            y = builder.emit_output(relax.call_tir(kernel, [x, w], out))
        builder.emit_func_output(y)
    return builder.finalize()


def gflops(run, m):
    """Best of 40."""
    run()
    best = min(timed(run) for _ in range(40))
    return 2 * m * N * K / best / 1e9


def timed(run):
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    """Compile three times and compare."""
    m = 126
    random = np.random.default_rng(0)
    x, w, y = (
        tvm.runtime.tensor(random.standard_normal(shape, dtype=np.float32))
        for shape in ((m, K), (N // 16, K, 16), (m, N))
    )
    module = tvm.IRModule({"gemm": gemm.with_attr("global_symbol", "gemm")})
    alone = tvm.compile(module, target=TARGET, tir_pipeline="s_tir")
    print(
        f"the product alone:             {gflops(lambda: alone['gemm'](x, w, y), m):6.1f} GFLOP/s"
    )
    for name, passes in (("beside shape_func:", []), ("shape_func with noalias:", [no_alias])):
        pipeline = tvm.transform.Sequential([relax.pipeline.get_default_pipeline(TARGET), *passes])
        built = tvm.compile(
            relax_module(), target=TARGET, relax_pipeline=pipeline, tir_pipeline="s_tir"
        )
        main = relax.VirtualMachine(built, tvm.cpu())["main"]
        print(f"{name:30} {gflops(lambda main=main: main(x, w), m):6.1f} GFLOP/s")


if __name__ == "__main__":
    main()
