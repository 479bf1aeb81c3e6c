"""The same kernel, run from memory and from the library that ``export_library`` writes.

    TVM_NUM_THREADS=1 PYTHONPATH=. python reports/upstream/jit-slower-than-library/repro.py

Runs the flash attention and the matrix product of this repository, alternating, best of 15 each.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import tvm

from relax_impl.config import MPTConfig
from relax_impl.kernels.cpu import FAST
from relax_impl.kernels.cpu.attention import flash_kernel
from relax_impl.kernels.cpu.linear import linear_kernel
from relax_impl.target import resolve

RAW = {"d_model": 512, "n_heads": 8, "n_layers": 1, "vocab_size": 64, "no_bias": True}
CONFIG = MPTConfig.from_dict({**RAW, "attn_config": {"alibi": True}})


def milliseconds(run, tensors):
    """Time of one call."""
    start = time.perf_counter()
    run(*tensors)
    return (time.perf_counter() - start) * 1e3


def main():
    """Compile both ways, run in turns, print the best of each."""
    flash = flash_kernel(FAST.attention, CONFIG, "float32", CONFIG.scale, False)
    linear = linear_kernel(1536, "float32", "float32", False, False)
    functions = {"attention": flash, "linear": linear}
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    random = np.random.default_rng(0)

    def tensor(*shape):
        return tvm.runtime.tensor(random.standard_normal(shape, dtype=np.float32))

    arguments = {
        "attention": [*(tensor(1, 512, 8, 64) for _ in range(3)), tensor(8), tensor(1, 512, 8, 64)],
        "linear": [tensor(1, 128, 512), tensor(96, 512, 16), tensor(1, 128, 1536)],
    }
    base = resolve("llvm")
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for name, level in (("default level", None), ("opt-level 2", 2)):
            settings = {"kind": "llvm", "mcpu": str(base.attrs["mcpu"])}
            settings["mattr"] = [str(feature) for feature in base.attrs["mattr"]]
            if level:
                settings["opt-level"] = level
            built = tvm.compile(module, target=tvm.target.Target(settings), tir_pipeline="s_tir")
            path = Path(folder) / f"{level}.so"
            built.export_library(str(path))
            ways[f"in memory, {name}"] = built
            ways[f"library, {name}"] = tvm.runtime.load_module(str(path))
        best = {}
        for _ in range(15):
            for way, executable in ways.items():
                for kernel, tensors in arguments.items():
                    spent = milliseconds(executable[kernel], tensors)
                    best[way, kernel] = min(best.get((way, kernel), spent), spent)
    for (way, kernel), spent in best.items():
        print(f"{way:28} {kernel:10} {spent:7.3f} ms")


if __name__ == "__main__":
    main()
