"""Files of the cache: written whole, and known to be what was written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write(path: Path, fill: Callable[[str], object]) -> None:
    """Write a file and its seal; another process never sees half of it.

    Parameters
    ----------
    path
        Its directory is made if need be.
    fill
        Writes the file it is given the name of, with the suffix of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=path.suffix, prefix=".", dir=path.parent)
    os.close(handle)
    try:
        fill(unfinished)
        digest = hashlib.sha256(Path(unfinished).read_bytes()).hexdigest()
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    replace(_seal(path), digest.encode())


def replace(path: Path, content: bytes) -> None:
    """Put content in the place of a file, or of none."""
    handle, unfinished = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(unfinished, path)


def intact(path: Path) -> bool:
    """Whether a file is the one that was written.

    Asked before a library is loaded: mapping a truncated one kills the process.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _seal(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")
