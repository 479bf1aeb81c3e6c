"""What a safetensors file holds: its header, parsed and checked here.

The header is parsed by this module and not by the safetensors library because a JSON object with a
key twice is legal to most parsers, which keep the last; a port that then reads the other one holds
other weights. Here both are listed.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from harness.checkpoint.dtypes import BY_SAFETENSORS
from harness.checkpoint.entry import Entry, TensorInfo, contiguous_strides, reading
from harness.errors import BadInput

MAX_HEADER = 100_000_000
"""Largest header the format allows, in bytes."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as they were written, repetitions included."""


def list_safetensors(path: Path) -> tuple[Entry, ...]:
    """List every tensor of a safetensors file without reading its data.

    Raises
    ------
    BadInput
        The file is truncated, or its header is no header, names an unknown dtype, or its tensors
        do not cover the data exactly once.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        lead = file.read(8)
        if size == 0:
            raise BadInput("the file is empty", where=str(path), expected="a safetensors file")
        if len(lead) < 8:
            raise BadInput("the file is truncated within its header length", where=str(path))
        (length,) = struct.unpack("<Q", lead)
        if length > min(size - 8, MAX_HEADER):
            raise BadInput(
                "the file is truncated or not safetensors: the header is longer than can be",
                where=str(path),
                expected=f"at most {min(size - 8, MAX_HEADER)} bytes",
                found=f"{length} bytes",
            )
        header = file.read(length)
    entries = tuple(
        _entry(path, name, fields, 8 + length, size)
        for name, fields in _parse(path, header)
        if name != "__metadata__"
    )
    _check_cover(path, entries, 8 + length, size)
    return entries


def _parse(path: Path, header: bytes) -> _Pairs:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the header is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(parsed, _Pairs):
        raise BadInput("the header is not a JSON object", where=str(path))
    return parsed


def _entry(path: Path, name: str, fields: Any, data_start: int, size: int) -> Entry:
    def bad(what: str, expected: object, found: object) -> BadInput:
        return BadInput(
            f"tensor {name!r}: {what}", where=str(path), expected=expected, found=repr(found)[:80]
        )

    def whole(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)

    keys = sorted(k for k, _ in fields) if isinstance(fields, _Pairs) else None
    if keys != ["data_offsets", "dtype", "shape"]:
        raise bad("malformed header entry", "dtype, shape and data_offsets, each once", keys)
    values = dict(fields)
    code, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    kind = BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if kind is None:
        raise bad("unknown dtype", ", ".join(BY_SAFETENSORS), code)
    if not whole(shape):
        raise bad("malformed shape", "a list of non-negative integers", shape)
    if not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("malformed data_offsets", "[begin, end] with begin <= end", offsets)
    info = TensorInfo(name, tuple(shape), kind.name, path.name)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise bad(
            f"data_offsets do not fit shape {shape} of {kind.name}",
            f"{info.nbytes} bytes",
            end - begin,
        )
    if data_start + end > size:
        raise bad(
            "the file is truncated: the data ends beyond the file",
            f"at least {data_start + end} bytes",
            size,
        )
    return Entry(info, data_start + begin, contiguous_strides(info.shape, kind.numpy.itemsize))


def _check_cover(path: Path, entries: tuple[Entry, ...], data_start: int, size: int) -> None:
    """Require the data to be covered without overlap, holes or a tail, as the format does."""
    position, previous = data_start, None
    # A name listed twice with the very same bytes is a duplicate entry, not an overlap.
    ranges = {(e.offset, e.info.nbytes, e.info.name) for e in entries if e.info.nbytes}
    for offset, nbytes, name in sorted(ranges):
        if offset < position:
            raise BadInput(
                f"the data of tensors {previous!r} and {name!r} overlaps", where=str(path)
            )
        if offset > position:
            raise BadInput(
                f"{offset - position} bytes before tensor {name!r} belong to no tensor",
                where=str(path),
            )
        position, previous = offset + nbytes, name
    if position != size:
        raise BadInput(
            f"{size - position} bytes at the end of the file belong to no tensor",
            where=str(path),
            expected=f"a file of {position} bytes",
            found=size,
        )
