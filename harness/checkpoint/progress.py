"""Progress of a long copy: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STEPS = 10


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on standard error for the length of a ``with`` block.

    Yields
    ------
    callable
        To be told the bytes done and their total.
    """
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    times = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """A line whenever another tenth is done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = -1

    def __call__(self, done: int, total: int) -> None:
        step = _STEPS * done // total if total else _STEPS
        if step > self._last:
            self._last = step
            print(f"{self._what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)
