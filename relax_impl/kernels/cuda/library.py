"""Kernels by name: written into the graph as calls, compiled and linked in afterwards.

A kernel is a TIRX function, which says how it is launched and describes its tensors to the copy
engine, around a device function of the ``.cuh`` files. A library of Relax operators is lowered by
another pipeline than TIRX, so kernels become a module of their own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn.core import wrap_nested
from tvm.target import Target

Factory = Callable[[str], tvm.tirx.PrimFunc]
"""Makes the kernel of a given name."""

_FACTORIES: dict[str, Factory] = {}


@functools.cache
def digest() -> str:
    """Eight hexadecimal digits that change with the kernels' code.

    They are part of every name, so that a library on disk is never taken for a newer one.
    """
    content = hashlib.sha256()
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".cuh", ".py"):
            content.update(file.read_bytes())
    return content.hexdigest()[:8]


def call(
    kind: str, factory: Factory, arguments: Iterable[Tensor], shape: Iterable[Any], dtype: str
) -> Tensor:
    """Emit a call of a kernel.

    Parameters
    ----------
    kind
        What distinguishes the kernel from all others, as an identifier.
    factory
        Makes the kernel, given its full name.
    arguments
        Its inputs.
    shape, dtype
        Of its output.
    """
    name = f"mpt_{kind}_{digest()}"
    _FACTORIES[name] = factory
    out = relax.TensorType(list(shape), dtype)
    emitted = relax.call_dps_packed(name, [argument._expr for argument in arguments], out)
    return wrap_nested(emitted, kind)


def names(module: tvm.IRModule) -> tuple[str, ...]:
    """Kernels that a module calls, sorted."""
    found: set[str] = set()

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.ExternFunc):
            found.add(str(expression.global_symbol))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function.body, visit)
    return tuple(sorted(found & _FACTORIES.keys()))


def kernels(module: tvm.IRModule) -> tvm.IRModule:
    """The TIRX functions that a module calls."""
    return tvm.IRModule({name: _FACTORIES[name](name) for name in names(module)})


def wgmma_target(target: Target) -> Target:
    """The target as the compiler must know it to accept Hopper's own instructions."""
    config = {str(key): value for key, value in target.export().items() if key != "host"}
    return Target({**config, "arch": "sm_90a"}, host=target.host)


def attach(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Compile the kernels that a module calls and link them to it."""
    called = kernels(module)
    if not called.functions:
        return module
    built = tvm.compile(called, target=wgmma_target(target), tir_pipeline="tirx")
    return module.with_attr("external_mods", [built.mod])
