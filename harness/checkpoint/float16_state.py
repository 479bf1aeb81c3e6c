"""An interruptible conversion's state on disk: a lock, a partial directory, finished shards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.checkpoint.rounding import Counts
from harness.checkpoint.writer import sync, write_durably
from harness.errors import BadInput

STATE = ".conversion-state.json"
_READ_STEP = 2**22


@dataclass(frozen=True)
class FinishedShard:
    """What was recorded of a shard once it was whole on disk.

    Attributes
    ----------
    source_digest
        SHA-256 of the source tensors' elements, in the shard's order.
    size, digest
        Bytes and SHA-256 of the shard's file.
    counts
        What happened to the elements of every tensor, in the shard's order.
    """

    source_digest: str
    size: int
    digest: str
    counts: tuple[Counts, ...]


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
        Record of every finished shard by file name.
    """

    path: Path
    plan: str
    finished: dict[str, FinishedShard] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, plan: str) -> Partial:
        """Make the directory, or take over what an earlier run of the same plan left in it."""
        partial = cls(path, plan)
        if path.is_dir():
            partial.finished = _load(path / STATE, plan)
            if not partial.finished:
                partial.start_over()
        else:
            path.mkdir()
        return partial

    def start_over(self) -> None:
        """Empty the directory."""
        self.finished = {}
        shutil.rmtree(self.path)
        self.path.mkdir()

    def is_intact(self, name: str) -> bool:
        """Whether a finished shard's file is still what was recorded."""
        known, file = self.finished.get(name), self.path / name
        if known is None or not file.is_file() or file.stat().st_size != known.size:
            return False
        return _digest_of(file) == known.digest

    def record(self, name: str, shard: FinishedShard) -> None:
        """Note durably that the shard `name`, already synced, is whole."""
        self.finished[name] = shard
        shards = {n: asdict(s) for n, s in self.finished.items()}
        text = json.dumps({"plan": self.plan, "shards": shards}, indent=1)
        write_durably(self.path / STATE, text.encode())

    def clear_all_but(self, names: set[str]) -> None:
        """Remove what an earlier run left besides the files in `names`."""
        for entry in os.scandir(self.path):
            if entry.name in names | {STATE}:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

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


def _load(path: Path, plan: str) -> dict[str, FinishedShard]:
    """Records of finished shards; none where the state is absent, torn or of another plan."""
    try:
        state = json.loads(path.read_bytes())
        if state["plan"] != plan:
            return {}
        return {
            name: FinishedShard(
                shard["source_digest"],
                shard["size"],
                shard["digest"],
                tuple(Counts(**c) for c in shard["counts"]),
            )
            for name, shard in state["shards"].items()
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(_READ_STEP):
            digest.update(part)
    return digest.hexdigest()


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
