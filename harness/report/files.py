"""Writing reports: whole or not at all."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import BadInput


def plain(value: Any) -> Any:
    """Return a record as dicts, lists and scalars, with non-finite numbers as ``None``."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(record: Any) -> bytes:
    """Return a record as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(plain(record)), indent=2) + b"\n"


def require_writable(path: Path) -> None:
    """Refuse a place that cannot be written before the work whose result should go there.

    Raises
    ------
    BadInput
        If the directory is missing or closed, or the name is a directory's.
    """
    reason = ""
    if path.is_dir():
        reason = "it is a directory"
    elif not path.parent.is_dir():
        reason = f"there is no directory {path.parent}"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        reason = f"the directory {path.parent} is closed to this user"
    if reason:
        raise BadInput(f"cannot be written: {reason}", where=str(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write under; it takes ``path``'s place if all went well.

    Raises
    ------
    BadInput
        If the place cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            # mkstemp makes private files; a report is as readable as any other file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its name only when it is complete.

    Raises
    ------
    BadInput
        If the place cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)
