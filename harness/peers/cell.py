"""One cell of the table: one peer on one feature in one dtype, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OWN = "relax"
"""The port stands in the table like everybody else."""
State = Literal["conforms", "diverges", "refuses", "crashes", "not supported", "not proven"]


@dataclass(frozen=True)
class Cell:
    """What became of one question.

    Attributes
    ----------
    peer, feature, dtype
        What was asked of whom.
    state
        ``"refuses"``: the peer raised an error of its own, which is the right thing to do with what
        it does not compute. ``"crashes"``: it ended the whole process. ``"not supported"``: it
        cannot be asked. ``"not proven"``: less was compared than is expected.
    versions
        Of the peer's packages.
    first
        Tap of the first divergence.
    fault, alike
        What the divergence looks like, and what it cannot be told apart from.
    reason
        Why it refuses, is not supported or could not be explained.
    ratio
        The largest statistic over its limit.
    logit_error
        Relative L2 error of the deployed logits.
    top1, positions
        Positions with the same best token, of how many.
    seconds
        Wall clock of the check.
    command
        Asks it again.
    """

    peer: str
    feature: str
    dtype: str
    state: State
    versions: dict[str, str]
    first: str = ""
    fault: str | None = None
    alike: tuple[str, ...] = ()
    reason: str = ""
    ratio: float | None = None
    logit_error: float | None = None
    top1: int | None = None
    positions: int | None = None
    seconds: float = 0.0
    command: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from other cells."""
        return self.peer, self.feature, self.dtype

    @property
    def found(self) -> str:
        """The divergence in a few words; empty where there is none."""
        if self.state != "diverges":
            return ""
        what = self.fault or "no fault of the library"
        return f"{self.first}: {what}"


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one forward.

    Attributes
    ----------
    peer, threads, dtype
        Who, on how many threads, in what.
    milliseconds
        Of every round, in the order in which they were measured.
    versions
        Of the peer's packages.
    """

    peer: str
    threads: int
    dtype: str
    milliseconds: tuple[float, ...]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from others."""
        return self.peer, self.threads

    @property
    def median(self) -> float:
        """Median of the rounds."""
        ordered = sorted(self.milliseconds)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def plain(value: Cell | Speed) -> dict[str, Any]:
    """Return a record as plain data."""
    from dataclasses import asdict

    return asdict(value)
