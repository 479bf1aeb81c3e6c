"""Converting one shard: mapping, rounding, hashing, writing and syncing at the same time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import FLOATS
from harness.checkpoint.float16_state import FinishedShard
from harness.checkpoint.rounding import Counts, round_to_float16
from harness.checkpoint.writer import Shard

_CHUNK = 2**21  # elements
_BUFFERS = 4
_SYNC_EVERY = 2**26  # bytes

Read = Callable[[str], np.ndarray[Any, Any]]


def chunks(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Runs of an array's elements in row-major order, a copy only if it is not contiguous."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def raw(array: np.ndarray[Any, Any]) -> Any:
    """The bytes of a one-dimensional array."""
    return array.view(np.uint8)


def digest_source(shard: Shard, read: Read) -> str:
    """SHA-256 of the source elements of a shard's tensors."""
    digest = hashlib.sha256()
    for tensor in shard.tensors:
        for chunk in chunks(read(tensor.name)):
            digest.update(raw(chunk))
    return digest.hexdigest()


class _Output:
    """A file written by one thread, hashed by a second and synced by a third."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file = stack.enter_context(path.open("wb", buffering=0))
        self._writer, self._hasher, self._syncer = (
            stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)
        )
        self.digest = hashlib.sha256()
        self.size = 0
        self._unsynced = 0
        self._sync: Future[None] | None = None

    def put(self, data: Any) -> tuple[Future[None], ...]:
        """Begin to write and hash `data`; it must stay as it is until the futures are done."""
        return (
            self._writer.submit(self._write, memoryview(data)),
            self._hasher.submit(self.digest.update, data),
        )

    def _write(self, data: memoryview) -> None:
        self.size += data.nbytes
        self._unsynced += data.nbytes
        while data.nbytes:
            data = data[os.write(self._file.fileno(), data) :]
        # Left alone, the kernel keeps gigabytes of dirty pages until the final fsync.
        if self._unsynced >= _SYNC_EVERY and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())
            self._unsynced = 0

    def finish(self) -> None:
        if self._sync is not None:
            self._sync.result()
        os.fsync(self._file.fileno())


def convert_shard(
    shard: Shard, read: Read, path: Path, advance: Callable[[int], None]
) -> FinishedShard:
    """Write `shard` to `path`, rounding floating point tensors to float16.

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
    FinishedShard
        The record of the file, which is synced.
    """
    source_digest = hashlib.sha256()
    buffers = [np.empty(_CHUNK * 8, np.uint8) for _ in range(_BUFFERS)]
    busy: deque[tuple[Future[None], ...]] = deque()
    counts = []
    with ExitStack() as stack:
        output = _Output(path, stack)
        source_hasher = stack.enter_context(ThreadPoolExecutor(1))
        busy.append(output.put(np.frombuffer(shard.header, np.uint8)))
        for tensor in shard.tensors:
            total = Counts()
            for chunk in chunks(read(tensor.name)):
                while len(busy) >= _BUFFERS:
                    for future in busy.popleft():
                        future.result()
                buffers.append(buffers.pop(0))
                hashing = source_hasher.submit(source_digest.update, raw(chunk))
                rounds = tensor.dtype == "float16" and chunk.dtype.name in FLOATS
                out = buffers[-1][: chunk.size * (2 if rounds else chunk.itemsize)]
                if rounds:
                    total += round_to_float16(chunk, out.view(np.float16))
                else:
                    out[:] = raw(chunk)
                busy.append((hashing, *output.put(out)))
                advance(chunk.nbytes)
            counts.append(total)
        for futures in busy:
            for future in futures:
                future.result()
        output.finish()
    return FinishedShard(
        source_digest.hexdigest(), output.size, output.digest.hexdigest(), tuple(counts)
    )
