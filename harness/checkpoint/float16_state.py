"""An interruptible conversion's state on disk: a lock, a partial directory, finished shards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.checkpoint.writer import sync, write_durably
from harness.errors import BadInput

STATE = ".conversion-state.json"


@dataclass
class Partial:
    """The directory in which a conversion grows.

    Attributes
    ----------
    path
        The directory.
    plan
        Fingerprint of the conversion; another one's shards are not taken over.
    finished
        File names of the shards that were whole on disk. The state is a promise that they are
        worth verifying, not a proof that they are right.
    """

    path: Path
    plan: str
    finished: set[str] = field(default_factory=set)

    @classmethod
    @contextmanager
    def open(cls, path: Path, plan: str) -> Iterator[Partial]:
        """Make the directory, or take over what an earlier run of the same plan left in it.

        On failure it stays if a shard in it is finished, and goes away otherwise.
        """
        partial = cls(path, plan)
        if path.is_dir():
            partial.finished = _load(path / STATE, plan)
        else:
            path.mkdir()
        try:
            yield partial
        except BaseException:
            if not partial.finished:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def record(self, names: set[str]) -> None:
        """Note durably that the shards `names`, already synced, are the finished ones."""
        self.finished = names
        state = {"plan": self.plan, "finished": sorted(names)}
        write_durably(self.path / STATE, (json.dumps(state, indent=1) + "\n").encode())

    def clear_all_but(self, names: set[str]) -> None:
        """Remove what earlier runs left besides the shards `names`, and forget it."""
        for entry in os.scandir(self.path):
            if entry.name not in names | {STATE}:
                _remove(Path(entry.path))
        self.record(names)

    def publish(self, target: Path) -> None:
        """Give the directory its final name, in place of what may be there."""
        (self.path / STATE).unlink()
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


def _load(path: Path, plan: str) -> set[str]:
    """Names of finished shards; none where the state is absent, torn or of another plan."""
    try:
        state = json.loads(path.read_bytes())
        return {str(name) for name in state["finished"]} if state["plan"] == plan else set()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


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
