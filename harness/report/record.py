"""The record of one check: plain data, ready for JSON, terminal and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class SkipRecord:
    """Items left out of an axis for a stated reason."""

    count: int
    reason: str


@dataclass(frozen=True)
class AxisRecord:
    """One axis: what was expected, compared, and left out with a reason."""

    expected: int
    compared: int
    skipped: tuple[SkipRecord, ...]


@dataclass(frozen=True)
class DivergenceRecord:
    """First divergence in order of evaluation; numbers in units of expected rounding noise."""

    tap: str
    layer: int | None
    head: int | None
    token: int | None
    row: int | None
    mode: str
    case: str
    statistic: str
    observed: float | None
    limit: float | None
    reason: str


@dataclass(frozen=True)
class DiagnosisRecord:
    """The fault of the library that a divergence looks like; ``fault`` is ``null`` for none.

    ``coefficient`` is the size of the error along the fault's template, 1 where the fault is;
    ``uncertainty`` what healthy implementations show there; ``explained`` the share of the squared
    error. Where no fault is named they belong to ``nearest``.
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
class TapRecord:
    """One tap in one mode: its worst case.

    ``observed`` and ``limit`` belong to ``statistic`` and are in units of the expected rounding
    noise; ``ratio`` is their quotient; ``null`` stands for a number that is not finite.
    """

    tap: str
    layer: int | None
    mode: str
    verdict: str
    ratio: float | None
    statistic: str
    observed: float | None
    limit: float | None
    relative_error: float | None
    case: str
    cases: int
    elements: int
    returned: str
    note: str


@dataclass(frozen=True)
class TensorRecord:
    """What became of one checkpoint tensor in the subject."""

    tensor: str
    arrived: bool
    detail: str


@dataclass(frozen=True)
class FailureRecord:
    """A call into the subject that failed, with its traceback."""

    tap: str
    case: str
    reason: str
    detail: str


@dataclass(frozen=True)
class LogitRecord:
    """The deployed logits of one case in people's terms; losses in nats a token."""

    case: str
    positions: int
    top1_agree: int
    top5_agree: int
    near_ties: int
    kl_mean: float
    kl_max: float
    golden_loss: float | None
    subject_loss: float | None


@dataclass(frozen=True)
class ConversionRecord:
    """What rounding the checkpoint's weights to the storage dtype cost."""

    source: str
    target: str
    elements: int
    overflowed: int
    flushed: int
    inexact: int


@dataclass(frozen=True)
class SubjectRecord:
    """What was judged, as it declares itself.

    ``offers`` and ``lacks`` divide the optional methods of the protocol.
    """

    name: str
    dtype: str
    target: str
    fault: str | None
    rounding: Mapping[str, str]
    offers: tuple[str, ...]
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointRecord:
    """What it was judged on."""

    path: str
    digest: str
    config: Mapping[str, Any]
    tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EvidenceRecord:
    """The figures of the certificate of the gate that gave the verdict.

    ``current`` says that it was measured with the factors in force; ``at_most`` bounds the share of
    healthy checkpoints that are flagged, at 95 % confidence.
    """

    certificate: str
    target: str
    dtype: str
    current: bool
    planted: int
    caught: int
    healthy: int
    flagged: int
    at_most: float | None


@dataclass(frozen=True)
class Report:
    """One check from end to end."""

    schema: int
    verdict: str
    reason: str
    subject: SubjectRecord
    checkpoint: CheckpointRecord
    compared: Mapping[str, AxisRecord]
    first_divergence: DivergenceRecord | None
    taps: tuple[TapRecord, ...]
    tensors: tuple[TensorRecord, ...]
    logits: tuple[LogitRecord, ...]
    failures: tuple[FailureRecord, ...]
    conversion: ConversionRecord | None
    diagnosis: DiagnosisRecord | None
    environment: Mapping[str, str]
    seconds: float
    reproduce: str
    evidence: EvidenceRecord | None = None
