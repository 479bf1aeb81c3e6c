"""Writes runs until it is killed, and says the name of each once it is committed."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

from harness.ledger.store import Ledger

_spec = importlib.util.spec_from_file_location("made", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def write(place: str, first: int, count: int) -> None:
    with Ledger.open(place, write=True) as ledger:
        for number in range(first, first + count):
            entry = made.made_entry(number)
            ledger.write(entry)
            os.write(1, f"{entry.run.id}\n".encode())


def killed(place: str, kills: int, seed: int) -> None:
    """Fork a writer, kill it after a random while, and again; from an empty file on."""
    import random

    random.seed(seed)
    # Forked writers find everything imported, and live for about as long as a few runs take here.
    started = time.monotonic()
    with Ledger.open(f"{place}.warm", write=True) as ledger:
        for number in range(4):
            ledger.write(made.made_entry(number))
    longest = 2 * (time.monotonic() - started)
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            # More than can be written before the signal comes.
            write(place, kill * 1_000_000, 1_000_000)
            os._exit(0)
        time.sleep(random.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
