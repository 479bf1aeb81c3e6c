"""What a diagnosis starts from, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.judge.factors import Factors
from harness.judge.verdict import Row
from harness.localise import Divergence
from harness.measure.oracle import Oracle, Read
from harness.measure.run import Case
from harness.subjects.protocol import Array


@dataclass(frozen=True)
class Diagnosis:
    """What a divergence looks like.

    Attributes
    ----------
    fault
        Name of the library's fault, or ``None``: none of these.
    layer
        Block of the tap, ``None`` outside the blocks.
    layers
        All blocks whose own tap of that name diverges.
    tap
        Path of the tap that was matched.
    coefficient, uncertainty, explained
        See ``Match``; of the named fault, or of the nearest one.
    alike
        Other faults that do the same here, within the noise.
    nearest
        The fault that explains most where none is named.
    tried
        Faults whose mechanism can act at that tap.
    reason
        Why there is no name.
    """

    fault: str | None
    layer: int | None
    layers: tuple[int, ...]
    tap: str
    coefficient: float | None
    uncertainty: float | None
    explained: float | None
    alike: tuple[str, ...]
    nearest: str | None
    tried: int
    reason: str


@dataclass(frozen=True)
class Inquiry:
    """What a diagnosis starts from.

    Attributes
    ----------
    oracle, subject, cases
        As they were judged.
    rows, first
        The verdict's.
    raw
        The checkpoint's config.json.
    read
        Original tensor name to array, as the checkpoint has it.
    dumped
        Case to taps by path, in place of a subject that runs.
    checkpoint
        Digest of the checkpoint; templates of one without are not remembered.
    excluded
        Faults that are left out of the library.
    memory
        Templates by place and case: leaving out another fault computes none of them again.
    """

    oracle: Oracle
    subject: Any
    cases: Sequence[Case]
    rows: Sequence[Row]
    first: Divergence
    raw: Mapping[str, Any]
    read: Read
    factors: Factors
    dumped: Mapping[str, Mapping[str, Array]] | None = None
    checkpoint: str = ""
    excluded: frozenset[str] = frozenset()
    memory: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> Any:
        """The config as the port's room parses it."""
        from relax_impl.config import MPTConfig

        return MPTConfig.from_dict(self.raw)
