"""What travels with converted weights: the configuration, and the files beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.checkpoint.entry import reading
from harness.checkpoint.strict_json import read_object
from harness.checkpoint.writer import sync
from harness.errors import BadInput

_DTYPE_KEYS = ("torch_dtype", "dtype")
_FORMATS = "bin safetensors index.json pt pth ckpt msgpack h5 gguf ggml onnx"
_WEIGHTS = tuple("." + suffix for suffix in _FORMATS.split())
# What git and the hub client keep about the old weights, at times with the weights themselves.
_BOOKKEEPING = (".git", ".cache")
_BLANK = " \t\n\r"


def config_with_dtype(path: Path, dtype: str) -> bytes:
    """Give the text of a ``config.json`` with its dtype replaced and every other byte kept.

    ``torch_dtype`` is replaced, or ``dtype``, or both where both are there; where neither is,
    ``torch_dtype`` is added at the end.

    Raises
    ------
    BadInput
        The file is not a JSON object with distinct keys.
    """
    known = read_object(path)
    with reading(path):
        data = path.read_bytes()
    encoding = json.detect_encoding(data)
    text = data.decode(encoding)
    value = json.dumps(dtype)
    spans = [(start, end) for key, start, end in _members(text) if key in _DTYPE_KEYS]
    if spans:
        for start, end in reversed(spans):
            text = text[:start] + value + text[end:]
    else:
        head = text.rstrip(_BLANK).removesuffix("}").rstrip(_BLANK)
        comma = "," if known else ""
        text = f'{head}{comma}\n  "torch_dtype": {value}\n}}\n'
    return text.encode(encoding)


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Keys of the outermost object, each with the span of its value; `text` is valid JSON."""
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        while text[at] in _BLANK:
            at += 1
        return at

    at = skip(skip(0) + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = skip(skip(at) + 1)  # past the colon
        _, end = decoder.raw_decode(text, start)
        yield key, start, end
        at = skip(end)
        if text[at] == ",":
            at = skip(at + 1)


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights or of their index, in any format."""
    return name.lower().endswith(_WEIGHTS)


def copy_side_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy everything but weights, their indexes and ``config.json`` from `source` to `target`.

    Links are followed, so that the copy stands alone; ``.git`` and ``.cache`` are left behind.

    Returns
    -------
    tuple of str
        The relative names of the copied files.

    Raises
    ------
    BadInput
        A link that leads nowhere, or in a circle.
    """
    return tuple(_copy(source, target, "", (os.path.realpath(source),)))


def _copy(source: Path, target: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        relative = prefix + entry.name
        if entry.name in _BOOKKEEPING or relative == "config.json":
            continue
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above:
                raise BadInput("the link leads in a circle", where=entry.path)
            (target / relative).mkdir(exist_ok=True)
            yield from _copy(Path(entry.path), target, relative + "/", (*above, real))
            sync(target / relative)
        elif is_weight_file(entry.name):
            continue
        elif entry.is_file():
            shutil.copy2(entry.path, target / relative)
            sync(target / relative)
            yield relative
        elif entry.is_symlink():
            raise BadInput("the link leads nowhere", where=entry.path, hint="remove or repair it")


def size_of_side_files(source: Path) -> int:
    """Upper bound of the bytes that `copy_side_files` writes, links to folders left out."""
    total = 0
    for folder, _, names in os.walk(source):
        files: list[Any] = [Path(folder, n) for n in names if not is_weight_file(n)]
        total += sum(f.stat().st_size for f in files if f.is_file())
    return total
