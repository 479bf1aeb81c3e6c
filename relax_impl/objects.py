"""Libraries linked from one object file per kernel; the objects are kept on disk by content.

Two models have most of their kernels in common if they differ in a building block, a layer or a
field that few kernels see: what both have is compiled once. And kernels are compiled side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax, tirx

from relax_impl import sealed
from relax_impl.target import threads

PIPELINE = "s_tir"
FORMAT = "1"
"""Raised when what is done to a kernel here changes: it is not part of the kernel."""


def link(
    module: tvm.IRModule,
    target: tvm.target.Target,
    passes: tvm.transform.Pass,
    path: Path,
    objects: Path,
) -> None:
    """Compile a module for a CPU into a library.

    Parameters
    ----------
    module
        Relax functions and kernels.
    target
        An LLVM target.
    passes
        From Relax to calls of kernels.
    path
        Is written, and sealed.
    objects
        Directory of compiled kernels, shared by processes.
    """
    with target:
        lowered = passes(module)
    kernels = {}
    for variable, function in lowered.functions_items():
        if isinstance(function, tirx.PrimFunc):
            kernel = _Kernel.of(variable.name_hint, function)
            kernels[kernel.symbol] = kernel
            lowered[variable] = relax.ExternFunc(kernel.symbol)
    files = _compiled(tuple(kernels.values()), target, objects)
    built = tvm.compile(lowered, target=target, relax_pipeline=None)
    sealed.write(path, lambda name: built.export_library(name, addons=[str(f) for f in files]))


@dataclass(frozen=True)
class _Kernel:
    """A kernel under a name that says what it computes."""

    symbol: str
    function: tirx.PrimFunc

    @classmethod
    def of(cls, name: str, function: tirx.PrimFunc) -> _Kernel:
        """Name a kernel by its structure: which number a module gave it must not matter."""
        bare = function.without_attr("global_symbol")
        found = tvm_ffi.structural_hash(bare, map_free_vars=True)
        symbol = f"{name.rstrip('0123456789')}_{found:016x}"
        return cls(symbol, bare.with_attr("global_symbol", symbol))

    def key(self, target: tvm.target.Target) -> str:
        """Digest of all that decides what its object holds."""
        compiler = (FORMAT, PIPELINE, tvm.__version__, tvm_ffi.__version__, str(target))
        return hashlib.sha256("\0".join((*compiler, self.symbol)).encode()).hexdigest()


def _compiled(
    kernels: Sequence[_Kernel], target: tvm.target.Target, objects: Path
) -> tuple[Path, ...]:
    """Return an object file for each kernel; those that are not there are compiled first."""
    files = {objects / f"{kernel.key(target)}.o": kernel for kernel in kernels}

    def compiled(file: Path) -> None:
        kernel = files[file]
        module = tvm.IRModule({kernel.symbol: kernel.function})
        built = tirx.build(module, target=target, pipeline=PIPELINE)
        sealed.write(file, built.write_to_file)

    missing = [file for file in files if not sealed.intact(file)]
    # The compiler does not hold the interpreter's lock.
    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(compiled, missing):
            pass
    return tuple(files)
