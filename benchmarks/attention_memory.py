"""Memory that the attention kernels add to their arguments, next to a tensor of scores.

    python benchmarks/attention_memory.py [--lengths 1024,2048,4096] [--heads 8] [--dim 64]
                                          [--dtype float32] [--output FILE]

As many queries as keys, for the kernel of the plain forward and for the one over a cache. What is
shown is how far the resident memory rose while the kernel ran: the operating system's own peak, set
back before the call (Linux). The cache is that of the arguments; over it nothing is packed again.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import re
import sys
import threading
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: blocks from this size on are given back to the system when they are freed."""
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB = 1 << 20


def resident(field: str) -> int:
    """Return bytes of this process: VmRSS now, VmHWM at most since the peak was set back."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


class Kernels:
    """Both kernels of one size, compiled once for all lengths."""

    def __init__(self, heads: int, dim: int, dtype: str) -> None:
        import numpy as np
        import tvm

        from relax_impl.cached import CachedAttention
        from relax_impl.config import MPTConfig
        from relax_impl.kernels.cpu import FAST
        from relax_impl.kernels.cpu.attention import flash_kernel
        from relax_impl.kernels.cpu.cached import cached_kernel
        from relax_impl.target import resolve, use_all_cores, wide_vectors

        use_all_cores()
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.random = np.random.default_rng(0)
        raw = {"d_model": heads * dim, "n_heads": heads, "attn_config": {"alibi": True}}
        config, target = MPTConfig.from_dict(raw), resolve("llvm")
        with target:
            plain = flash_kernel(FAST.attention, config, dtype, config.scale, wide_vectors())
            cached = cached_kernel(CachedAttention(), FAST.attention, config, dtype, config.scale)
        functions = {"forward": plain, "cache": cached}
        module = tvm.IRModule(
            {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
        )
        self.run = tvm.compile(module, target=target, tir_pipeline="s_tir")
        self.slopes = tvm.runtime.tensor(FAST.slopes(config))
        self.nothing = [tvm.runtime.tensor(np.zeros(1, np.int32)) for _ in range(2)]
        for name in functions:
            self.rises(name, 16)

    def tensor(self, *shape: int) -> Any:
        import numpy as np
        import tvm

        array = self.random.standard_normal(shape, np.float32).astype(self.dtype)
        return tvm.runtime.tensor(array)

    def rises(self, name: str, length: int) -> int:
        """Return by how many bytes the process grew while the kernel ran."""
        from relax_impl.cached import PANEL

        plain = (1, length, self.heads, self.dim)
        if name == "forward":
            given = [*(self.tensor(*plain) for _ in range(3)), self.slopes, self.tensor(*plain)]
        else:
            keys = self.tensor(1, self.heads, length // PANEL, self.dim, PANEL)
            values = self.tensor(1, self.heads, length, self.dim)
            query, out = self.tensor(*plain), self.tensor(*plain)
            given = [query, keys, values, *self.nothing, self.slopes, out]
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        # A thread of its own: TVM keeps what it took for a call until the thread that asked ends.
        thread = threading.Thread(target=self.run[name], args=given)
        thread.start()
        thread.join()
        return resident("VmHWM") - before


def table(options: argparse.Namespace) -> str:
    # What lies free in the heap would hide what a kernel takes.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    kernels = Kernels(options.heads, options.dim, options.dtype)
    lines = [
        f"{options.heads} heads of {options.dim}, {options.dtype}, {platform.machine()}, "
        "as many queries as keys, MiB",
        "",
        "| length | forward adds | over a cache adds | K and V alone | scores would be |",
        "|---|---|---|---|---|",
    ]
    for length in map(int, options.lengths.split(",")):
        rose = [kernels.rises(name, length) / MIB for name in ("forward", "cache")]
        width = 4 if options.dtype == "float32" else 2
        both = 2 * length * options.heads * options.dim * width / MIB
        scores = length * length * options.heads * 4 / MIB
        lines.append(f"| {length} | {rose[0]:.1f} | {rose[1]:.1f} | {both:.1f} | {scores:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096", help="multiples of 16")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float16", "float32"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = table(options)
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
