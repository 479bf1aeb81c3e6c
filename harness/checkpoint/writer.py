"""Writing safetensors shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.checkpoint.entry import TensorInfo
from harness.errors import BadInput

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name and its tensors in the order of their data."""

    file: str
    tensors: tuple[TensorInfo, ...]

    @property
    def header(self) -> bytes:
        """The bytes before the data: length, JSON, padding to eight bytes."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self.tensors:
            described[tensor.name] = {
                "dtype": BY_NAME[tensor.dtype].safetensors,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def plan_shards(tensors: Iterable[TensorInfo], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over shards in their order.

    Parameters
    ----------
    tensors
        What to write; ``file`` is ignored. Names are distinct.
    max_shard_bytes
        Most bytes of tensor data in a shard. A tensor larger than this has a shard of its own.

    Returns
    -------
    tuple of Shard
        One ``model.safetensors``, or a numbered series.

    Raises
    ------
    BadInput
        A name twice, a reserved or unwritable name, or `max_shard_bytes` below 1.
    """
    if max_shard_bytes < 1:
        raise BadInput(
            "no tensor fits into a shard",
            where="max_shard_bytes",
            expected="at least 1",
            found=max_shard_bytes,
        )
    groups: list[list[TensorInfo]] = [[]]
    names: set[str] = set()
    filled = 0
    for tensor in tensors:
        if tensor.name in names or tensor.name == "__metadata__":
            raise BadInput(
                f"the tensor name {tensor.name!r} is taken", expected="distinct names of tensors"
            )
        try:
            tensor.name.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"the tensor name {tensor.name!r} is not valid Unicode") from error
        names.add(tensor.name)
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    total = len(groups)
    return tuple(_shard(number, total, group) for number, group in enumerate(groups, start=1))


def _shard(number: int, total: int, group: list[TensorInfo]) -> Shard:
    file = f"model-{number:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"
    # Wide elements first keeps every tensor aligned; the sort is stable, so with one dtype the
    # order stays as it was.
    ordered = sorted(group, key=lambda t: -BY_NAME[t.dtype].numpy.itemsize)
    return Shard(file, tuple(replace(t, file=file) for t in ordered))


def write_index(directory: Path, shards: tuple[Shard, ...]) -> None:
    """Write the index of several shards; of a single one there is none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.tensors)},
        "weight_map": {t.name: s.file for s in shards for t in s.tensors},
    }
    write_durably(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that after a crash it is there whole, old or new."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors_shards(
    directory: Path,
    tensors: Iterable[TensorInfo],
    read: Callable[[str], np.ndarray[Any, Any]],
    *,
    max_shard_bytes: int,
) -> tuple[Shard, ...]:
    """Write tensors as safetensors into `directory`, with an index where there are several shards.

    Parameters
    ----------
    directory
        An existing directory.
    tensors
        What to write: names, shapes and dtypes.
    read
        Gives the array of a name; called once for each tensor, its result dropped before the next.
    max_shard_bytes
        Most bytes of tensor data in a shard.

    Returns
    -------
    tuple of Shard
        What was written.

    Raises
    ------
    BadInput
        `read` gave another shape or dtype than announced, or see `plan_shards`.
    OSError
        The disk refused; shards written so far stay.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    for shard in shards:
        with (directory / shard.file).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                _write_tensor(file, tensor, read(tensor.name))
            file.flush()
            os.fsync(file.fileno())
    write_index(directory, shards)
    sync(directory)
    return shards


def _write_tensor(file: BinaryIO, tensor: TensorInfo, array: np.ndarray[Any, Any]) -> None:
    dtype = BY_NAME[tensor.dtype].numpy
    if array.shape != tensor.shape or array.dtype != dtype:
        raise BadInput(
            f"tensor {tensor.name!r} is not what was announced",
            expected=f"{tensor.dtype} {list(tensor.shape)}",
            found=f"{array.dtype} {list(array.shape)}",
        )
    raw: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    file.write(raw)
