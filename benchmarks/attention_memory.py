"""Peak memory and time of the attention kernel over the length, next to a tensor of scores.

    python benchmarks/attention_memory.py [--lengths 1024 2048 4096 8192] [--heads 8] [--dim 64]

Each length runs in a process of its own, since a peak is one per process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

MIB = 1 << 20


def measure(length: int, heads: int, dim: int, dtype: str) -> dict[str, float]:
    import numpy as np
    import tvm

    from relax_impl.config import MPTConfig
    from relax_impl.kernels.cpu import FAST
    from relax_impl.kernels.cpu.attention import flash_kernel
    from relax_impl.target import resolve, use_all_cores, wide_vectors

    use_all_cores()
    config = MPTConfig.from_dict(
        {"d_model": heads * dim, "n_heads": heads, "attn_config": {"alibi": True}}
    )
    target = resolve("llvm")
    with target:
        kernel = flash_kernel(FAST.attention, config, dtype, config.scale, wide_vectors())
    module = tvm.IRModule({"attention": kernel.with_attr("global_symbol", "attention")})
    run = tvm.compile(module, target=target, tir_pipeline="s_tir")["attention"]
    random = np.random.default_rng(0)

    def tensor(length: int) -> object:
        array = random.standard_normal((1, length, heads, dim), np.float32).astype(dtype)
        return tvm.runtime.tensor(array)

    slopes = tvm.runtime.tensor(FAST.slopes(config))
    small = [tensor(16) for _ in range(3)]
    run(*small, slopes, tensor(16))
    arguments = [tensor(length) for _ in range(3)]
    out = tensor(length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(*arguments, slopes, out)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"workspace": (peak - before) / MIB, "seconds": min(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float16", "float32"])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.heads, options.dim, options.dtype)))
        return
    print(f"{options.heads} heads of {options.dim}, {options.dtype}")
    print(
        f"{'length':>8} {'workspace MiB':>14} {'packed K, V MiB':>16} {'scores MiB':>11} {'ms':>8}"
    )
    for length in options.lengths:
        command = [sys.executable, *sys.argv, "--one", str(length)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(ran.stdout)
        packed = 2 * length * options.heads * options.dim * 4 / MIB
        scores = length * length * options.heads * 4 / MIB
        print(
            f"{length:8} {found['workspace']:14.1f} {packed:16.1f} {scores:11.1f}"
            f" {found['seconds'] * 1e3:8.1f}"
        )


if __name__ == "__main__":
    main()
