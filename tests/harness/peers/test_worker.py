"""A peer that ends the process it is asked in: its cell says so, and the others are asked on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.errors import BadInput
from harness.peers.worker import Worker

QUESTION = ("torch-export", "cached-decode", "float32")
"""Answered without a model: the graph has no cache."""


@pytest.fixture
def worker() -> Worker:
    made = Worker()
    # Started, so that there is something to end.
    made._started()
    return made


def test_a_process_that_aborts_is_a_cell_and_is_replaced(worker: Worker, tmp_path: Path) -> None:
    os.kill(worker._process.pid, signal.SIGABRT)
    found = worker.ask(*QUESTION, tmp_path)
    assert (found.state, found.reason) == ("crashes", "ends the process with SIGABRT")
    assert found.versions
    assert found.command == (
        "mpt-conform peers --only torch-export --feature cached-decode --dtype float32"
    )
    again = worker.ask(*QUESTION, tmp_path)
    worker.close()
    assert (again.state, again.reason) == ("not supported", "the exported graph has no cache")


def test_a_process_that_somebody_else_ended_says_nothing_of_the_peer(
    worker: Worker, tmp_path: Path
) -> None:
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(BadInput, match=r"peer:torch-export.*ended with code -9"):
        worker.ask(*QUESTION, tmp_path)


def test_what_goes_wrong_here_is_no_crash_of_the_peer(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no such feature"):
        worker.ask("torch-export", "no such feature", "float32", tmp_path)
    worker.close()
