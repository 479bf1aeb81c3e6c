"""Converting one shard: mapping, rounding and writing at the same time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import FLOATS
from harness.checkpoint.rounding import Counts, Rounder
from harness.checkpoint.writer import Shard

_CHUNK = 2**20  # elements
_BUFFERS = 4
_SEND_EVERY = 2**26  # bytes

Read = Callable[[str], np.ndarray[Any, Any]]
Advance = Callable[[int], None]


def _chunks(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Runs of an array's elements in row-major order, a copy only if it is not contiguous."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _convert(
    chunk: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any], rounder: Rounder
) -> tuple[Any, Counts]:
    """The bytes to write for a chunk, within `buffer`, and what rounding did."""
    if chunk.dtype.name in FLOATS:
        out = buffer[: 2 * chunk.size]
        return out, rounder(chunk, out.view(np.float16))
    out = buffer[: chunk.nbytes]
    out[:] = chunk.view(np.uint8)
    return out, Counts()


def _buffer() -> np.ndarray[Any, Any]:
    return np.empty(_CHUNK * 8, np.uint8)  # elements of at most eight bytes; touched as needed


class _Output:
    """A file written by a thread of its own, and on its way to the disk meanwhile."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file = stack.enter_context(path.open("wb", buffering=0))
        self._writer = stack.enter_context(ThreadPoolExecutor(1))
        self._written = self._sent = 0

    def put(self, data: Any) -> Future[None]:
        """Begin to write `data`, which must stay as it is until the future is done."""
        return self._writer.submit(self._write, memoryview(data))

    def _write(self, data: memoryview) -> None:
        while data.nbytes:
            count = os.write(self._file.fileno(), data)
            self._written += count
            data = data[count:]
        # Left alone, the kernel keeps gigabytes of dirty pages until the final fsync. To say that
        # they are not needed starts to write them; unlike fdatasync it waits for no journal.
        waiting = self._written - self._sent
        if waiting >= _SEND_EVERY and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._sent, waiting, os.POSIX_FADV_DONTNEED)
            self._sent = self._written

    def finish(self) -> None:
        os.fsync(self._file.fileno())


def convert_shard(shard: Shard, read: Read, path: Path, advance: Advance) -> tuple[Counts, ...]:
    """Write `shard` to `path`, rounding floating point tensors to float16, and sync it.

    Parameters
    ----------
    shard
        The plan: dtypes are those to write.
    read
        Gives the source array of a name, floating point or already of the dtype to write.
    path
        The file, overwritten.
    advance
        Called with the number of source bytes dealt with since the last call.

    Returns
    -------
    tuple of Counts
        What happened to the elements of every tensor, in the shard's order.
    """
    buffers = deque(_buffer() for _ in range(_BUFFERS))
    busy: deque[Future[None]] = deque()
    rounder = Rounder()
    counts = []
    with ExitStack() as stack:
        output = _Output(path, stack)
        busy.append(output.put(shard.header))
        for tensor in shard.tensors:
            total = Counts()
            for chunk in _chunks(read(tensor.name)):
                if len(busy) == _BUFFERS:
                    busy.popleft().result()
                buffers.rotate()
                data, done = _convert(chunk, buffers[0], rounder)
                busy.append(output.put(data))
                total += done
                advance(chunk.nbytes)
            counts.append(total)
        for write in busy:
            write.result()
        output.finish()
    return tuple(counts)


def verify_shard(shard: Shard, read: Read, path: Path) -> tuple[Counts, ...] | None:
    """Whether the file at `path` is, to the byte, what `convert_shard` would write.

    Returns
    -------
    tuple of Counts or None
        What `convert_shard` would give, or None if the file differs.
    """
    buffer = _buffer()
    rounder = Rounder()
    counts = []
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != shard.nbytes:
            return None
        if file.read(len(shard.header)) != shard.header:
            return None
        for tensor in shard.tensors:
            total = Counts()
            for chunk in _chunks(read(tensor.name)):
                data, done = _convert(chunk, buffer, rounder)
                found = np.fromfile(file, np.uint8, data.size)
                if not np.array_equal(found, data):
                    return None
                total += done
            counts.append(total)
        os.fsync(file.fileno())  # whoever wrote it may have been killed before this
    return tuple(counts)
