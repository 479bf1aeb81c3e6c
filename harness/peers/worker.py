"""A process that answers one question after another, and is replaced when a peer ends it."""

from __future__ import annotations

import os
import signal
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.peers.ask import asked_again, versions
from harness.peers.cell import Cell
from harness.peers.healthy import feature_of

Question = tuple[str, str, str, Path]
"""Peer, feature, dtype, and the folder where checkpoints are kept."""


class Worker:
    """Answers in a process of its own: a library that aborts takes that one with it, and no more.

    Between two `forget`, golden and orders of a checkpoint are kept for the next peer.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._line: Connection | None = None

    def ask(self, name: str, feature: str, dtype: str, folder: Path) -> Cell:
        """Return the answer, which is ``"crashes"`` if the peer ended the process.

        Raises
        ------
        BadInput
            If something else ended it.
        Exception
            Whatever went wrong here and not in the peer.
        """
        line = self._started()
        try:
            line.send((name, feature, dtype, folder))
            answer = line.recv()
        except (EOFError, OSError):
            reason = self._ended(name)
            return Cell(
                name, feature, dtype, "crashes", versions(name),
                reason=reason, command=asked_again(name, feature, dtype),
            )  # fmt: skip
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Cell)
        return answer

    def forget(self) -> None:
        """Forget the checkpoint."""
        if self._line is not None:
            self._line.send(None)

    def close(self) -> None:
        """End the process."""
        if self._line is not None:
            self._line.close()
            self._process.join()
            self._line = None

    def _started(self) -> Connection:
        if self._line is None:
            context = get_context("spawn")
            self._line, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._line

    def _ended(self, name: str) -> str:
        self._process.join()
        code, self._line = self._process.exitcode, None
        # What the system sends when memory is short, or a user, is no answer of the peer.
        if code is None or code >= 0 or -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            raise BadInput(
                f"the process that asked it ended with code {code}",
                where=f"peer:{name}",
                hint="the answers so far are in the record, and the same command goes on from them",
            )
        return f"ends the process with {signal.Signals(-code).name}"


def _serve(line: Connection) -> None:
    """Answer until the other end is closed."""
    from harness.certify.observe import remember
    from harness.peers.ask import ask

    # Libraries start no threads of their own, and the oracle is asked once.
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    forget = remember()
    while True:
        try:
            question: Question | None = line.recv()
        except EOFError:
            return
        if question is None:
            forget()
            continue
        name, feature, dtype, folder = question
        answer: Cell | Exception
        try:
            with warnings.catch_warnings():
                # Of the peers' own libraries, about themselves.
                warnings.simplefilter("ignore")
                answer = ask(name, feature_of(feature), dtype, folder, lambda text: None)
        except Exception as error:
            answer = error
        try:
            line.send(answer)
        except OSError:
            # Whoever asked was ended meanwhile.
            return
