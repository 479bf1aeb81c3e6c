"""A compiled model as one file: built on one machine, run on another that only has the runtime.

A bundle is a zip archive of the shared library and of a manifest, which says what it was made from
and what the library's bytes are. It is used only where both still hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from relax_impl import cubin, index, sealed
from relax_impl.compile import (
    Library,
    cache_directory,
    default_operations,
    load_library,
    write_library,
)
from relax_impl.config import MPTConfig
from relax_impl.graph import build_graph
from relax_impl.target import HOPPER, resolve

SCHEMA = 1
MANIFEST, LIBRARY = "bundle.json", "library.so"
ARCHITECTURE = "sm_90a"
_WHEN = (1980, 1, 1, 0, 0, 0)
"""The same content makes the same file."""


class BundleError(ValueError):
    """A bundle cannot be made, read, or used for what it is asked for; one sentence."""


def target_of(kind: str, arch: str | None) -> tvm.target.Target:
    """Return the target of a bundle: for CUDA with host code that every x86-64 can run.

    Raises
    ------
    BundleError
        An architecture was given for a target that has none.
    """
    if kind != "cuda":
        if arch is not None:
            raise BundleError(f"arch: expected none for target {kind}, found {arch!r}")
        return resolve(kind)
    arch = arch or ARCHITECTURE
    if arch in ("sm_90", "sm_90a"):
        return resolve(json.dumps({**HOPPER, "host": {"kind": "llvm"}}))
    return resolve(json.dumps({"kind": "cuda", "arch": arch, "host": {"kind": "llvm"}}))


def _made_of(config: MPTConfig, dtype: str, target: str, kind: str) -> dict[str, Any]:
    """Return everything that a library is made from, as text."""
    shape = dataclasses.replace(config, torch_dtype=None, unknown=())
    return {
        "config": repr(shape),
        "dtype": dtype,
        "kind": kind,
        # Host code for this very processor: it is refused by another one.
        "target": target if kind == "llvm" else "",
        "sources": index.sources(),
        "tvm": tvm.__version__,
        "tvm-ffi": tvm_ffi.__version__,
    }


def build(
    config: MPTConfig, dtype: str, kind: str, output: Path, *, arch: str | None = None
) -> dict[str, Any]:
    """Compile a model into a bundle.

    Parameters
    ----------
    config, dtype
        The model and its storage dtype.
    kind
        ``llvm``, or ``cuda``, for which no device is needed. A process that has built for CUDA
        without a driver cannot use a device afterwards.
    output
        The file; replaced only by a whole one.
    arch
        Of the device, `ARCHITECTURE` by default.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    BundleError
        A compiler is missing, or the target cannot be compiled for.
    """
    if kind not in ("llvm", "cuda"):
        raise BundleError(f"target: expected llvm or cuda, found {kind!r}")
    target = target_of(kind, arch)
    operations = default_operations("llvm" if kind == "llvm" else _as_json(target))
    try:
        if kind == "cuda":
            cubin.prepare(arch or ARCHITECTURE)
        with target:
            graph = build_graph(config, dtype, lambda layer: operations)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / LIBRARY
            write_library(graph, target, path)
            content = path.read_bytes()
    except cubin.CompilerError as error:
        raise BundleError(str(error)) from error
    known = index.Known(LIBRARY, graph.functions, graph.variants, graph.layout)
    manifest = {
        "schema": SCHEMA,
        "made of": _made_of(config, dtype, str(target), kind),
        "arch": str(target.attrs["arch"]) if kind == "cuda" else "",
        "note": json.loads(index.encoded(known)),
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    handle, unfinished = tempfile.mkstemp(prefix=".", dir=output.parent)
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            archive.writestr(zipfile.ZipInfo(MANIFEST, _WHEN), text)
            archive.writestr(
                zipfile.ZipInfo(LIBRARY, _WHEN), content, compress_type=zipfile.ZIP_DEFLATED
            )
        # A temporary file is its owner's alone; a bundle is to be passed on.
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, output)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return manifest


def _as_json(target: tvm.target.Target) -> str:
    return json.dumps({"kind": target.kind.name, "arch": str(target.attrs["arch"])})


def _content(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return manifest and library, and require the library to be the one that was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            content = archive.read(LIBRARY)
        found, expected = hashlib.sha256(content).hexdigest(), manifest["sha256"]
        schema = manifest["schema"]
        made = manifest["made of"]
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        why = f"{type(error).__name__}: {error}"
        raise BundleError(f"{path} is damaged, or no bundle: {why}") from error
    if schema != SCHEMA or not isinstance(made, dict):
        raise BundleError(f"{path}: expected a bundle of schema {SCHEMA}, found {schema!r}")
    if found != expected:
        raise BundleError(f"{path} is damaged: the library's digest is not the one of its manifest")
    return manifest, content


def open_bundle(path: Path, config: MPTConfig, dtype: str, kind: str) -> Library:
    """Return the library of a bundle, loaded.

    Parameters
    ----------
    path
        The file.
    config, dtype, kind
        What it is wanted for; `kind` is ``llvm`` or ``cuda``.

    Raises
    ------
    BundleError
        It is damaged, or was made from another config, for another dtype or target, by other
        sources or another TVM.
    """
    manifest, content = _content(path)
    wanted = _made_of(config, dtype, str(resolve(kind)), kind)
    for field, value in wanted.items():
        found = manifest["made of"].get(field)
        if found != value:
            expected = value if len(str(value)) < 40 else "that of this run"
            shown = f", found {found}" if len(str(found)) < 40 else ""
            raise BundleError(
                f"{path} is stale: {field}: expected {expected}{shown}; build it anew"
            )
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / f"bundle-{manifest['sha256']}.so"
    # Written anew each time: what lies there may be damaged, and mapping that kills the process.
    sealed.replace(place, content)
    note = directory / f"bundle-{manifest['sha256']}.json"
    note.write_text(json.dumps(manifest["note"]))
    known = index.read(note)
    if known is None:
        raise BundleError(f"{path} is damaged: its note of the functions cannot be read")
    return Library(
        config=config,
        dtype=dtype,
        target=kind,
        path=place,
        functions=known.functions,
        variants=known.variants,
        layout=known.layout,
        executable=load_library(place, resolve(kind)),
        cached=True,
    )
