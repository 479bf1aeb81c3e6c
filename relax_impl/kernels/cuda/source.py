"""The CUDA C++ of the kernels, as one text that every module carries once."""

from __future__ import annotations

import functools
from pathlib import Path

C_TYPES = {"float16": "half", "bfloat16": "__nv_bfloat16", "float32": "float"}
PTX_TYPES = {"float16": "f16", "bfloat16": "bf16"}
TILES_N = (64, 128, 256)
KEYS = 128
OVERLAPPING = "tirx.use_programtic_dependent_launch"
"""Launch a kernel while the one before it ends (TVM's spelling); see ``hopper.cuh``."""
FILES = (
    "finish.cuh", "few.cuh", "tiles.cuh", "gemm.cuh", "norm.cuh", "attention.cuh", "past.cuh",
)  # fmt: skip
"""In the order of their use, after ``hopper.cuh`` and the matrix products."""
HEAD_DIMS = tuple(range(16, 129, 16))
"""Features of a head that the attention kernel is written for."""


def attributes(name: str) -> dict[str, object]:
    """Attributes of a kernel's function."""
    return {
        "global_symbol": name,
        "tirx.noalias": True,
        "tirx.kernel_launch_params": [OVERLAPPING],
    }


def wgmma(dtype: str, n: int) -> str:
    """Write the matrix products of a warpgroup with 64 x n results, by the PTX manual's syntax.

    ``from_shared`` multiplies two operands in shared memory, both in rows along k;
    ``from_registers`` one in registers by one whose rows run along n. `accumulate` 0 forgets
    what the registers held.
    """
    size = n // 2
    results = ", ".join(f"%{i}" for i in range(size))
    bound = ", ".join(f'"+f"(d[{i}])' for i in range(size))
    name = PTX_TYPES[dtype]
    operation = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name}"
    return f"""
template <>
struct Wgmma<{C_TYPES[dtype]}, {n}> {{
  static __device__ __forceinline__ void from_shared(float (&d)[{size}], u64 a, u64 b,
                                                     int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred keep;\\nsetp.ne.b32 keep, %{size + 2}, 0;\\n"
        "{operation} {{{results}}}, %{size}, %{size + 1}, keep, 1, 1, 0, 0;\\n}}"
        : {bound}
        : "l"(a), "l"(b), "r"(accumulate));
  }}
  static __device__ __forceinline__ void from_registers(float (&d)[{size}], u32 a0, u32 a1, u32 a2,
                                                        u32 a3, u64 b) {{
    asm volatile(
        "{operation} {{{results}}}, {{%{size}, %{size + 1}, %{size + 2}, %{size + 3}}}, "
        "%{size + 4}, 1, 1, 1, 1;"
        : {bound}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
  }}
}};
"""


@functools.cache
def source() -> str:
    """All device code, to be emitted before the kernels that call it."""
    here = Path(__file__).parent
    sizes = sorted({*TILES_N, KEYS, *HEAD_DIMS})
    products = "".join(wgmma(dtype, n) for dtype in PTX_TYPES for n in sizes)
    parts = [
        (here / "hopper.cuh").read_text(),
        f"namespace mpt {{\ntemplate <typename T, int N>\nstruct Wgmma;\n{products}\n}}\n",
        *((here / name).read_text() for name in FILES),
    ]
    # TVM writes the text before every kernel that names it.
    return "\n".join(["#ifndef MPT_KERNELS", "#define MPT_KERNELS", *parts, "#endif\n"])
