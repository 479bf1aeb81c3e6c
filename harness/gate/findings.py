"""What a gate finds: one finding a check, and one outcome from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from harness.gate.waivers import CHECKS, Waiver
from harness.ledger.records import Run

__all__ = ["CHECKS", "CellResult", "Finding", "GateResult", "State", "worst"]

State = Literal["pass", "fail", "not-proven"]


@dataclass(frozen=True)
class Finding:
    """One check of one cell.

    Attributes
    ----------
    check
        One of `CHECKS`.
    state
        Before any waiver.
    text
        One sentence, with value, limit, margin and place.
    waiver
        The waiver that covers it, expired or not.
    waived
        Whether it passes for that.
    """

    check: str
    state: State
    text: str
    waiver: str = ""
    waived: bool = False

    @property
    def blocks(self) -> bool:
        """Whether a release must wait."""
        return self.state != "pass" and not self.waived


@dataclass(frozen=True)
class CellResult:
    """Everything found about one required cell."""

    subject: str
    target: str
    dtype: str
    checkpoint: str
    run: Run | None
    findings: tuple[Finding, ...]
    reproduce: str

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.subject} {self.target} {self.dtype} {self.checkpoint}"

    @property
    def state(self) -> State:
        """The worst that is not waived: a failure outweighs a gap."""
        return worst([f.state for f in self.findings if f.blocks])


@dataclass(frozen=True)
class GateResult:
    """A release, cell by cell.

    ``waivers`` are all that there are, ``general`` what concerns no single cell.
    """

    release: str
    commit: str
    policy: str
    ledger: str
    made: str
    cells: tuple[CellResult, ...]
    waivers: tuple[Waiver, ...]
    general: tuple[Finding, ...] = field(default=())

    @property
    def state(self) -> State:
        """The outcome of the release."""
        loose = [finding.state for finding in self.general if finding.blocks]
        return worst([*(cell.state for cell in self.cells), *loose])

    @property
    def verdict(self) -> str:
        """The outcome in the words that `check` uses, for the exit code."""
        return {"pass": "conforms", "fail": "diverges", "not-proven": "not-proven"}[self.state]


def worst(states: Sequence[State]) -> State:
    """Return the worst of several states; nothing found is a pass."""
    if "fail" in states:
        return "fail"
    return "not-proven" if "not-proven" in states else "pass"
