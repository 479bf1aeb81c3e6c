"""What the ledger holds, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OF_LIMIT = "of_limit"
"""The worst statistic of a tap over its limit; above 1 the tap diverges."""
RELATIVE_ERROR = "relative_error"
TOP1_BEYOND_TIES = "top1_beyond_ties"
"""Positions whose best token is another one, and not by a tie within the noise."""
PERPLEXITY_INCREASE = "perplexity_increase"
"""Perplexity of the subject over the golden's, less 1."""
KL_MEAN = "kl_mean"
KL_MAX = "kl_max"


@dataclass(frozen=True)
class Cell:
    """What a release must prove one by one: a subject, on a target, in a dtype, on a checkpoint.

    ``subject`` is the name given to ``check --subject``; ``checkpoint`` the digest.
    """

    subject: str
    target: str
    dtype: str
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.subject} {self.target} {self.dtype} {self.checkpoint[:12]}"


@dataclass(frozen=True)
class Run:
    """One check, as it is identified.

    Attributes
    ----------
    id
        UTC time to the second and eight random digits: sorts by time.
    created
        UTC, ISO 8601 with microseconds.
    commit
        Of the code that was judged; ``-dirty`` at its end if files had been changed; empty if
        unknown.
    subject, name
        What was asked for, and how the subject calls itself.
    device, driver
        Names; empty if there is no driver.
    tvm, torch, transformers
        Versions.
    certificate, factors
        Digests of the certificate of this target and of the factors that made the limits.
    inputs
        Digest of all token ids.
    seeds
        Seeds of whatever was drawn for this run, by name.
    environment
        Versions, processor and threads.
    """

    id: str
    created: str
    commit: str
    subject: str
    name: str
    target: str
    dtype: str
    device: str
    driver: str
    fault: str
    checkpoint: str
    checkpoint_path: str
    certificate: str
    factors: str
    inputs: str
    seeds: Mapping[str, int]
    tvm: str
    torch: str
    transformers: str
    environment: Mapping[str, str]
    verdict: str
    reason: str
    seconds: float
    reproduce: str

    @property
    def cell(self) -> Cell:
        """The cell that this run speaks for."""
        return Cell(self.subject, self.target, self.dtype, self.checkpoint)


@dataclass(frozen=True)
class Value:
    """One metric of one tap in one run; ``None`` stands for a value that is not finite."""

    mode: str
    tap: str
    metric: str
    value: float | None
    layer: int | None = None
    statistic: str = ""


@dataclass(frozen=True)
class Entry:
    """A run with its values, and its details: the record of the check and what goes beyond it."""

    run: Run
    values: tuple[Value, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchor:
    """A run that a person has accepted as the one that others are held against."""

    cell: Cell
    run: str
    pinned: str
    release: str
    reason: str
