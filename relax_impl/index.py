"""Finding a compiled model without building its graph again.

A library is kept under the digest of its module, and to know that the module has to be built, which
takes longer than to load the library. A note beside it says which library the sources of this
package make of a config. It holds for the target's own building blocks only: others are functions,
whose content cannot be told from outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tvm
import tvm_ffi

from relax_impl.config import MPTConfig
from relax_impl.graph import Function
from relax_impl.layout import PANELS, ROWS, Layout

_LAYOUTS = {layout.name: layout for layout in (ROWS, PANELS)}


@dataclass(frozen=True)
class Known:
    """What is known of a compiled model: the file's name, and the graph without its module."""

    library: str
    functions: Mapping[str, Function]
    variants: tuple[int, ...]
    layout: Layout


@lru_cache(maxsize=1)
def sources() -> str:
    """Return the digest of every source file of this package."""
    digest = hashlib.sha256()
    room = Path(__file__).parent
    for path in sorted(room.rglob("*")):
        if path.suffix in (".py", ".cuh", ".cu"):
            digest.update(str(path.relative_to(room)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def note(directory: Path, config: MPTConfig, dtype: str, target: str, whole: bool = True) -> Path:
    """Return where the note of a config is, or would be.

    Parameters
    ----------
    directory
        Of the libraries.
    config, dtype, target
        What the library is made from; the target in full, with its instruction set.
    whole
        Whether it holds functions of the whole model.
    """
    parts = (
        tvm.__version__,
        tvm_ffi.__version__,
        sources(),
        repr(config),
        dtype,
        target,
        str(whole),
    )
    digest = hashlib.sha256("\0".join(parts).encode())
    return directory / f"{digest.hexdigest()}.json"


def read(path: Path) -> Known | None:
    """Return what a note says; None if there is none, or none that can be used."""
    try:
        raw = json.loads(path.read_text())
        functions = {
            name: Function(
                str(fields["name"]), tuple(fields["parameters"]), tuple(fields["outputs"])
            )
            for name, fields in raw["functions"].items()
        }
        layout = _LAYOUTS[raw["layout"]]
        return Known(str(raw["library"]), functions, tuple(raw["variants"]), layout)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def encoded(known: Known) -> bytes:
    """Return the note as it is written."""
    body = {
        "library": known.library,
        "functions": {name: vars(function) for name, function in known.functions.items()},
        "variants": known.variants,
        "layout": known.layout.name,
    }
    return json.dumps(body).encode()
