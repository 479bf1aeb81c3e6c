"""What measuring yields: records that hold statistics, never tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from harness.measure.statistics import Shares, Statistics
from harness.measure.taps import Place

Mode = Literal["local", "teacher-forced", "free-running", "deployed", "alibi"]


@dataclass(frozen=True)
class Measurement:
    """One tap of one prompt, observed and as the legitimate evaluation orders have it.

    Attributes
    ----------
    mode
        ``"local"``: the sub-module alone, from the subject's own inputs to it.
        ``"teacher-forced"``: chained inside one block from the golden stream.
        ``"free-running"``: chained from the token ids. ``"deployed"``: the fused ``forward``.
        ``"alibi"``: the bias as the attention applies it.
    place, prompt
        Where, and on which input.
    rows, columns
        Shape of the error matrix: token positions times features.
    exact
        Nothing is rounded here, so that every correct implementation is exact.
    observed
        Statistics of the subject's error.
    orders
        The same of each evaluation order; the limit comes from these.
    relative
        Relative L2 error.
    returned
        Dtype of the array that came back.
    length
        Sequence length, to turn a row into a token position.
    head
        Head of the largest error where columns belong to heads.
    overflow
        Golden magnitudes beyond the storage dtype: the checkpoint cannot be held in it.
    constant
        The golden is one constant, which hides most faults.
    shares
        Of the expected noise, what is not rounding to storage.
    """

    mode: Mode
    place: Place
    prompt: str
    rows: int
    columns: int
    exact: bool
    observed: Statistics
    orders: tuple[Statistics, ...]
    relative: float
    returned: str
    length: int
    head: int | None = None
    overflow: int = 0
    constant: bool = False
    shares: Shares = field(default_factory=Shares)


@dataclass(frozen=True)
class Skip:
    """Something expected that was not compared, and why."""

    axis: str
    item: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A call into the subject that failed; ``detail`` is its traceback."""

    place: Place
    prompt: str
    reason: str
    detail: str


@dataclass(frozen=True)
class LogitSummary:
    """The deployed logits in people's terms, over the positions of one prompt.

    Attributes
    ----------
    positions
        Number of positions compared.
    top1_agree, top5_agree
        Positions with the same best token, and with the golden best among the subject's best five.
    near_ties
        Disagreements where the golden gap is below the noise of both logits.
    kl_mean, kl_max
        Kullback-Leibler divergence from golden to subject, nats.
    golden_loss, subject_loss
        Mean negative log likelihood of the next token of the prompt, nats; NaN for one token.
    """

    prompt: str
    positions: int
    top1_agree: int
    top5_agree: int
    near_ties: int
    kl_mean: float
    kl_max: float
    golden_loss: float
    subject_loss: float


@dataclass(frozen=True)
class Conversion:
    """What rounding a checkpoint's weights to the storage dtype cost, in elements."""

    source: str
    target: str
    elements: int
    overflowed: int
    flushed: int
    inexact: int


Event = Measurement | Skip | Failure | LogitSummary
