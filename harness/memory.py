"""How much memory this process may still take, and by which limit."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Room:
    """Memory that is left.

    Attributes
    ----------
    free
        Bytes.
    limit
        What sets it, as a sentence has it.
    """

    free: int
    limit: str


UNLIMITED = 1 << 60


def room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Room:
    """Return the least of what the machine, its control groups and ``ulimit`` leave.

    Where nothing can be read, as outside Linux, there is no limit.
    """
    found = [*_machine(proc), *_ulimits(proc), *_groups(proc, groups)]
    return min(found, key=lambda each: each.free, default=Room(UNLIMITED, "no limit is known"))


def _machine(proc: Path) -> Iterator[Room]:
    available = _field(proc / "meminfo", "MemAvailable")
    if available is not None:
        yield Room(available, "memory of this machine")


def _ulimits(proc: Path) -> Iterator[Room]:
    for kind, field, name in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        soft, _ = resource.getrlimit(kind)
        used = _field(proc / "self" / "status", field)
        if soft != resource.RLIM_INFINITY and used is not None:
            yield Room(max(0, soft - used), name)


def _groups(proc: Path, groups: Path) -> Iterator[Room]:
    """Yield what every group from this process's up to the root leaves, of version 1 or 2."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, most, used = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, most, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = base / path.lstrip("/")
        while True:
            limit, taken = _number(place / most), _number(place / used)
            if limit is not None and taken is not None and limit < UNLIMITED:
                # Pages of files count as taken, but give way.
                cached = _stat(place / "memory.stat", "inactive_file")
                yield Room(max(0, limit - taken + cached), "its control group (cgroup)")
            if place == base or base not in place.parents:
                break
            place = place.parent


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(path: Path, name: str) -> int | None:
    """Return a field of a file of ``/proc``, given there in kB, in bytes."""
    for line in _text(path).splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _stat(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0
