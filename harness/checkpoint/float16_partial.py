"""A conversion's work on disk: a lock, and a directory that is renamed when it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.writer import sync
from harness.errors import BadInput


@dataclass
class Partial:
    """The directory in which a conversion grows.

    It carries no record of what is finished: whether a shard in it is right is seen by converting
    the source again and comparing bytes, which neither a torn file nor a changed source passes.

    Attributes
    ----------
    path
        The directory.
    worth_keeping
        Whether a finished shard lies in it that a later run can take over.
    """

    path: Path
    worth_keeping: bool = False

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Partial]:
        """Make the directory, or take over what an earlier run left in it.

        On failure it stays if it is worth keeping, and goes away otherwise.
        """
        if not path.is_dir():
            path.mkdir()
        partial = cls(path)
        try:
            yield partial
        except BaseException:
            if not partial.worth_keeping:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def clear_all_but(self, names: set[str]) -> None:
        """Remove what earlier runs left besides the shards `names`."""
        for entry in os.scandir(self.path):
            if entry.name not in names:
                _remove(Path(entry.path))

    def publish(self, target: Path) -> None:
        """Give the directory its final name, in place of what may be there."""
        sync(self.path)
        replaced = target.with_name(target.name + ".replaced")
        _remove(replaced)
        if os.path.lexists(target):
            target.rename(replaced)
        self.path.rename(target)
        sync(target.parent)
        _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def exclusively(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it that goes away with the lock.

    Raises
    ------
    BadInput
        Another process holds it.
    """
    path = target.with_name(target.name + ".lock")
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise BadInput(
                f"another run (process {holder}) is writing this", where=str(target), hint="wait"
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
