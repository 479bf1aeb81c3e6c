"""JSON files read strictly: one object, no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.checkpoint.entry import reading
from harness.errors import BadInput

_TOO_LARGE = 256 * 2**20


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return made


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object that `path` holds.

    Raises
    ------
    BadInput
        The file is unreadable, is not JSON, holds something else than an object, or an object in
        it (at any depth) has a key twice.
    """
    with reading(path):
        if not path.is_file():
            raise BadInput("the file is missing or is not a regular file", where=str(path))
        if path.stat().st_size > _TOO_LARGE:
            raise BadInput(
                "the file is too large for a description of a model",
                where=str(path),
                expected=f"at most {_TOO_LARGE} bytes",
                found=path.stat().st_size,
            )
        data = path.read_bytes()
    if not data.strip():
        raise BadInput("the file is empty", where=str(path), expected="a JSON object")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except _DuplicateKey as error:
        raise BadInput(
            f"the key {str(error)!r} appears twice in one object", where=str(path), expected="once"
        ) from error
    except (ValueError, RecursionError) as error:
        # ValueError covers JSONDecodeError, bad UTF-8 and integers of too many digits.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"the file is not valid JSON: {reason}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BadInput(
            "the file does not hold a JSON object",
            where=str(path),
            expected="an object ({...})",
            found=type(value).__name__,
        )
    return value
