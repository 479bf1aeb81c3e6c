"""Machine code for a CUDA device, made where there is none.

TVM's CUDA runtime compiles at build time only if it can be loaded, and it wants the driver's
library for that. It calls nothing of it before a kernel is launched: an empty library of the same
name will do, and nvcc makes the machine code.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

DRIVER = "libcuda.so.1"


class CompilerError(ValueError):
    """A tool is missing here, or nvcc refused a kernel."""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise CompilerError(f"{command[0]}: {lines[-1]}")


def compiled(code: str, arch: str) -> bytes:
    """Return the machine code of CUDA C++ for an architecture such as ``sm_90a``."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(code)
        virtual = arch.replace("sm_", "compute_")
        command = ["nvcc", "-cubin", "-w", "-O3", "-std=c++17"]
        _run([*command, f"-gencode=arch={virtual},code={arch}", "-o", str(result), str(source)])
        return result.read_bytes()


def prepare(arch: str) -> None:
    """Let this process put machine code for `arch` into what it builds; it cannot use a device.

    Raises
    ------
    CompilerError
        nvcc, or a C compiler for the empty driver, is missing.
    """
    for tool in ("nvcc", "gcc"):
        if shutil.which(tool) is None:
            raise CompilerError(f"{tool} is not on PATH")

    def callback(code: str, *_: Any) -> bytes:
        return compiled(code, arch)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", callback, override=True)
    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "empty.c", Path(folder) / DRIVER
        source.write_text("int empty;\n")
        _run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), str(source)])
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        runtime = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
        ctypes.CDLL(str(runtime), os.RTLD_LAZY | ctypes.RTLD_GLOBAL)
