"""What one run of a campaign left behind: plain data, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import BadInput


@dataclass(frozen=True)
class FaultRun:
    """A planted fault, checked.

    Attributes
    ----------
    fault, layer
        What was planted; ``None`` for every layer.
    area, exposure, equivalent
        As the library has them.
    verdict
        ``diverges``, ``conforms``, ``not-proven`` or ``error``.
    by_tap
        Whether a tap or a call diverged, and not only the arrival of tensors.
    lost
        Tensors that did not arrive.
    expected, found, mode
        Places: where it should be seen first, and where and how it was.
    ratio
        The largest statistic over its limit among all taps.
    ratios
        By mode and kind of tap, the largest statistic over its limit.
    named, alike
        The diagnosis.
    held_out
        The diagnosis with the fault and its other strengths left out of the library.
    rules
        Published rules that passed the logits.
    detail
        An error's message, or why nothing was compared.
    """

    fault: str
    layer: int | None
    area: str
    exposure: str
    equivalent: bool
    verdict: str
    by_tap: bool
    lost: int
    expected: str
    found: str
    mode: str
    ratio: float | None
    ratios: Mapping[str, float] = field(default_factory=dict)
    named: str | None = None
    alike: tuple[str, ...] = ()
    held_out: str | None = None
    rules: Mapping[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    detail: str = ""

    @property
    def key(self) -> str:
        """Identifies the run in a record."""
        at = "" if self.layer is None else f"@{self.layer}"
        return f"fault {self.fault}{at}"

    @property
    def killed(self) -> bool:
        """Whether the gate blocks it."""
        return self.verdict == "diverges"


@dataclass(frozen=True)
class HealthyRun:
    """A healthy subject on one checkpoint in one dtype, with every input of it.

    Attributes
    ----------
    weights
        Runs that share them are one cluster.
    subject, dtype
        What was judged.
    inputs
        Inputs judged.
    verdict
        ``conforms``, or a false alarm.
    found
        Where.
    ratio, ratios, rules
        As of a fault.
    """

    weights: str
    subject: str
    dtype: str
    inputs: int
    verdict: str
    found: str
    ratio: float | None
    ratios: Mapping[str, float] = field(default_factory=dict)
    rules: Mapping[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    detail: str = ""

    @property
    def key(self) -> str:
        """Identifies the run in a record."""
        return f"healthy {self.weights} {self.subject} {self.dtype}"

    @property
    def flagged(self) -> bool:
        """Whether the gate cried wolf; what could not be proved is no pass either."""
        return self.verdict != "conforms"


Run = FaultRun | HealthyRun


class Record:
    """A file that results are appended to as they come, so that a campaign can go on.

    Parameters
    ----------
    path
        ``None`` keeps results in memory alone.
    stamp
        What the results depend on beside the run itself: the digest of factors and sources. Results
        under another stamp are not those of this gate.
    """

    def __init__(self, path: Path | None, stamp: str) -> None:
        self._path, self._stamp = path, stamp
        self.runs: dict[str, Run] = {}
        if path is not None and path.exists():
            # What failed to run is run again.
            self.runs = {run.key: run for run in self._read(path) if run.verdict != "error"}

    def _read(self, path: Path) -> Iterable[Run]:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}", where=str(path)) from error
        for number, line in enumerate(lines, 1):
            try:
                entry: dict[str, Any] = msgspec.json.decode(line)
                if entry["stamp"] == self._stamp:
                    kind: Any = FaultRun if entry["kind"] == "fault" else HealthyRun
                    yield msgspec.convert(entry["run"], kind)
            except (msgspec.MsgspecError, KeyError, TypeError) as error:
                raise BadInput(
                    f"is no record of a campaign: {error}", where=f"{path}:{number}"
                ) from error

    def add(self, runs: Iterable[Run]) -> None:
        """Keep results, in the file too."""
        lines = []
        for run in runs:
            self.runs[run.key] = run
            kind = "fault" if isinstance(run, FaultRun) else "healthy"
            lines.append(msgspec.json.encode({"stamp": self._stamp, "kind": kind, "run": run}))
        if self._path is not None and lines:
            with self._path.open("ab") as file:
                file.write(b"\n".join(lines) + b"\n")
