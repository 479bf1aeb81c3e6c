"""From configuration to a compiled library, kept on disk by content."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from relax_impl import index, sealed
from relax_impl.config import MPTConfig
from relax_impl.graph import Function, Graph, LayerOperations, build_graph
from relax_impl.kernels import cuda
from relax_impl.kernels.cpu import FAST
from relax_impl.kernels.cuda.library import attach
from relax_impl.kernels.parsing import quick_inlining
from relax_impl.layout import Layout
from relax_impl.objects import link
from relax_impl.operations import PLAIN, Operations
from relax_impl.target import is_hopper, resolve, use_all_cores


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled model without weights.

    Attributes
    ----------
    path
        The shared library in the cache.
    device
        ``llvm`` or ``cuda``: where it runs.
    functions, variants, layout
        See `graph.Graph`.
    executable
        The loaded library; None for a device that this machine does not have.
    cached
        Whether it came from the cache.
    """

    config: MPTConfig
    dtype: str
    target: str
    path: Path
    functions: Mapping[str, Function]
    variants: tuple[int, ...]
    layout: Layout
    executable: Any
    cached: bool


def cache_directory() -> Path:
    """Where compiled libraries live: $XDG_CACHE_HOME/mpt-conformance, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mpt-conformance"


OBJECTS = "objects"
"""Where, in the cache directory, compiled kernels are kept."""


def cache_key(module: tvm.IRModule, target: tvm.target.Target) -> str:
    """Digest of all that decides what the library computes: module, target and compiler.

    The module enters function by function: by its structure, constants included, and where it calls
    others, whose names are not part of that, by its text as well. Its JSON would not do, nor would
    the structure of the whole: they tell equal nodes that are one object from those that are two,
    which depends on what the process has done before.
    """
    structure = []
    for variable, function in sorted(module.functions_items(), key=lambda item: str(item[0])):
        found = tvm_ffi.structural_hash(function, map_free_vars=True)
        calls = not isinstance(function, tvm.tirx.PrimFunc)
        text = function.script(show_meta=False) if calls else ""
        structure.append(f"{variable.name_hint} {found:016x} {text}")
    digest = hashlib.sha256()
    parts = (tvm.__version__, tvm_ffi.__version__, str(target), PIPELINE_VERSION, *structure)
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def default_operations(target: str) -> Operations:
    """Fastest building blocks for a target."""
    resolved = resolve(target)
    if is_hopper(resolved):
        return cuda.FAST
    return FAST if resolved.kind.name == "llvm" else PLAIN


def default_roundings(config: MPTConfig, dtype: str, target: str) -> dict[str, str]:
    """Where the building blocks of a target round, in the words of the subject protocol."""
    if is_hopper(resolve(target)):
        return cuda.roundings(config, dtype)
    return {"scores": "float32", "probabilities": "float32"}


PIPELINE_VERSION = "2"
"""Raised when `pipeline` changes: it is not part of the module."""


@tvm.transform.module_pass(opt_level=0, name="NoAlias")
class NoAlias:
    """Declare the arguments of every kernel free of aliases.

    The code generator asks one function, the last in order of names, and applies the answer to the
    whole module. Often that is the one that computes symbolic shapes, which is generated without
    the attribute: then every kernel keeps its accumulators in memory and is three times slower. The
    attribute is true there too: that function has one buffer; and no kernel is called in place.
    """

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Add ``tirx.noalias`` where it is missing."""
        for name, function in list(module.functions_items()):
            if isinstance(function, tvm.tirx.PrimFunc) and "tirx.noalias" not in function.attrs:
                module[name] = function.with_attr("tirx.noalias", True)
        return module


def pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """Relax passes for a target."""
    passes = [relax.pipeline.get_default_pipeline(target), NoAlias()]
    if target.kind.name == "cuda":
        # Otherwise every matrix product first writes a transposed copy of its weight.
        passes.insert(0, relax.transform.FuseTransposeMatmul())
        # Taps that nobody keeps.
        passes.insert(0, relax.transform.DeadCodeElimination())
    return tvm.transform.Sequential(passes)


def write_library(graph: Graph, target: tvm.target.Target, path: Path) -> None:
    """Compile into `path`, which is written whole and sealed."""
    if target.kind.name == "llvm":
        link(graph.module, target, pipeline(target), path, cache_directory() / OBJECTS)
        return
    built = tvm.compile(
        attach(graph.module, target),
        target=target,
        relax_pipeline=pipeline(target),
        tir_pipeline="s_tir",
    )
    sealed.write(path, built.export_library)


def load_library(path: Path, target: tvm.target.Target) -> Any:
    """Load the library, or return None where this machine lacks its device."""
    if target.kind.name == "cuda" and not tvm.cuda(0).exist:
        return None
    return tvm.runtime.load_module(str(path))


def compile_model(
    config: MPTConfig,
    dtype: str,
    target: str = "llvm",
    operations: LayerOperations | None = None,
    *,
    whole: bool = True,
) -> Library:
    """Compile a model, or find it compiled.

    Parameters
    ----------
    config
        The model.
    dtype
        Storage dtype: float16, bfloat16 or float32.
    target
        ``llvm``, resolved to this machine's instruction set, ``cuda``, or a TVM target as JSON.
    operations
        Layer to building blocks (-1 embedding, n_layers head); by default the target's fastest.
        Layers that get equal `Operations` share a function, so return the same object.
    whole
        False for a model whose layers are called one by one: see `graph.build_graph`.

    Returns
    -------
    Library
        Loaded from the cache directory. A file there that cannot be loaded is compiled anew.
    """
    use_all_cores()
    resolved = resolve(target)
    made_of = (config, dtype, str(resolved), whole)
    note = None if operations else index.note(cache_directory(), *made_of)
    known = index.read(note) if note else None
    if known is None or not sealed.intact(cache_directory() / known.library):
        best = default_operations(target)
        with resolved, quick_inlining():
            graph = build_graph(config, dtype, operations or (lambda layer: best), whole=whole)
        path = cache_directory() / f"{cache_key(graph.module, resolved)}.so"
        cached = sealed.intact(path)
        if not cached:
            write_library(graph, resolved, path)
        known = index.Known(path.name, graph.functions, graph.variants, graph.layout)
        if note:
            sealed.replace(note, index.encoded(known))
    else:
        cached = True
    path = cache_directory() / known.library
    return Library(
        config=config,
        dtype=dtype,
        target=resolved.kind.name,
        path=path,
        functions=known.functions,
        variants=known.variants,
        layout=known.layout,
        executable=load_library(path, resolved),
        cached=cached,
    )
