"""Records of what a checkpoint's shards hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from harness.checkpoint.dtypes import BY_NAME
from harness.errors import BadInput


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a shard declares it.

    Attributes
    ----------
    name
        The tensor's name in the original checkpoint.
    shape
        Its shape; ``()`` for a scalar.
    dtype
        Name of the stored element type, such as ``"bfloat16"``.
    file
        Name of the shard that holds it, relative to the checkpoint's directory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once."""
        return self.size * BY_NAME[self.dtype].numpy.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes lie.

    Attributes
    ----------
    info
        What the tensor is.
    offset
        Position of element ``[0, ..., 0]`` in the file, in bytes.
    strides
        Distance between neighbours along every axis, in bytes, none negative.
    """

    info: TensorInfo
    offset: int
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from the first element's start to the last element's end."""
        if self.info.size == 0:
            return 0
        reach = sum((n - 1) * s for n, s in zip(self.info.shape, self.strides, strict=True))
        return reach + BY_NAME[self.info.dtype].numpy.itemsize


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is still the one whose entries were listed."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> FileStamp:
        """Stamp of the file, given by path or descriptor, as it is now."""
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read `path` into `BadInput`."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"the file cannot be read: {error.strerror or error}", where=str(path)
        ) from error


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a dense row-major array of `shape`."""
    strides: list[int] = []
    step = itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
