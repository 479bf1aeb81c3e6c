"""Legitimate evaluation orders: one mathematics, rounded where declared, summed differently."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

StorageName = Literal["float16", "bfloat16", "float32"]
Accumulator = Literal["float32", "float32_cut", "float16", "bfloat16"]
STORAGES: tuple[StorageName, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Sum:
    """How a sum over a contracted axis is grouped.

    Attributes
    ----------
    kind
        ``"whole"``: one call of the BLAS at hand. ``"split"``: `size` equal parts, added in turn.
        ``"chunks"``: pieces of `size` elements, added one after the other to the accumulator, like
        a tensor core or a naive loop. ``"tree"``: leaves of `size` elements, added pairwise.
        ``"lanes"``: `size` interleaved partial sums, like the threads of a warp, then a tree.
    permutation
        Order in which elements are visited.
    """

    kind: Literal["whole", "split", "chunks", "tree", "lanes"] = "whole"
    size: int = 4
    permutation: Literal["none", "reversed", "shuffled", "halves"] = "none"


@dataclass(frozen=True)
class Softmax:
    """How a row of scores becomes a context.

    Attributes
    ----------
    kind
        The whole row at once, or online in blocks of keys.
    block
        Keys of a block.
    base
        ``"two"``: ``exp(x)`` is the power of two of ``x * log2(e)``, as GPU kernels have it. In
        float32 the rounding of that constant stretches every row of scores by 1.3e-8.
    """

    kind: Literal["whole", "online"] = "whole"
    block: int = 64
    base: Literal["e", "two"] = "e"


@dataclass(frozen=True)
class Norm:
    """How a norm is evaluated.

    Attributes
    ----------
    variance
        ``"two_pass"``: of the centred values. ``"one_pass"``: mean of squares minus square of the
        mean. ``"welford"``: running mean and sum of squares, merged over pieces of 32.
    round_normalised
        The normalised value is rounded to storage before the weight is applied to it, and the
        product before the bias, as topi and some CUDA kernels do.
    affine
        ``x * r + (-mean * r)`` with one rounding after the product and the sum, as torch's kernel
        does, instead of ``(x - mean) * r``. It cancels where a row is nearly constant.
    """

    variance: Literal["two_pass", "one_pass", "welford"] = "two_pass"
    round_normalised: bool = False
    affine: bool = False


@dataclass(frozen=True)
class Order:
    """One way to evaluate MPT: where to round, and how to group the sums between the roundings.

    Attributes
    ----------
    name
        Shown in records.
    compute
        Precision of everything between two rounding points.
    storage
        Precision in which tensors are held; None rounds nowhere.
    scores
        ``"storage"``: ``q k^T`` is rounded, and again after the scale, as the original does; the
        bias is added to that in `compute`. ``"float32"``: no rounding before the softmax.
    probabilities
        ``"storage"``: rounded before they meet the values. An online softmax rounds what it has at
        that moment, the unnormalised ones.
    residual
        ``"storage"``: a sub-module's output is rounded and so is the sum with the stream.
        ``"fused"``: added in `compute`, rounded once.
    activation
        ``"fused"``: GELU sees the up projection before it is rounded.
    accumulator
        ``"float32"``: sums are held in `compute`. ``"float32_cut"``: as the matrix unit of a Hopper
        GPU, which adds 16 products and what it holds, and cuts the sum to the 24 bits of float32
        towards zero instead of rounding it; what is added outside of a product (parts of a split
        sum) is added in `compute`. Otherwise each partial result of `step` terms and each running
        total is rounded to that type.
    step
        Terms added between two roundings of a narrow accumulator; not used otherwise.
    sum, softmax, norm
        Grouping of the sums.
    epilogue
        ``"separate"``: a product is rounded before its bias (or the scale of the logits) is
        applied, as an implementation without fused epilogues does.
    scale_on
        Whether the scale multiplies the scores or the queries (only where scores are not rounded).
    anchor
        Where ALiBi counts from: ``"query"``, ``"last_key"`` as the original, or ``"table"``, the
        last of `max_seq_len` positions, as a table does that is made once and cut from the left.
        All differ by a row constant; in float32 the larger numbers round more.
    gelu
        Formula: torch's own in `compute`, one of two compositions with erf, or ``"storage"``:
        torch's own kernel for the storage dtype, which approximates differently. The last needs a
        rounded argument; where the activation is fused it is torch's own in `compute`.
    native
        Evaluate with torch operations in the storage dtype itself, in the original's order. All
        fields about rounding and grouping are then descriptions, not instructions.
    """

    name: str
    compute: Literal["float64", "float32"] = "float32"
    storage: StorageName | None = None
    scores: Literal["storage", "float32"] = "storage"
    probabilities: Literal["storage", "float32"] = "storage"
    residual: Literal["storage", "fused"] = "storage"
    activation: Literal["storage", "fused"] = "storage"
    accumulator: Accumulator = "float32"
    step: int = 4
    sum: Sum = field(default_factory=Sum)
    softmax: Softmax = field(default_factory=Softmax)
    norm: Norm = field(default_factory=Norm)
    epilogue: Literal["fused", "separate"] = "fused"
    scale_on: Literal["scores", "queries"] = "scores"
    anchor: Literal["query", "last_key", "table"] = "query"
    gelu: Literal["torch", "half_first", "half_last", "storage"] = "torch"
    native: bool = False

    def __post_init__(self) -> None:
        """Refuse a combination that means nothing."""
        choices = {
            "compute": ("float64", "float32"),
            "storage": (None, *STORAGES),
            "scores": ("storage", "float32"),
            "probabilities": ("storage", "float32"),
            "residual": ("storage", "fused"),
            "activation": ("storage", "fused"),
            "accumulator": get_args(Accumulator),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"Order.{name}: expected one of {allowed}, found {value!r}")


GOLDEN = Order("golden", compute="float64")
"""float64 without any rounding: what all others are measured against."""


def ORIGINAL(storage: StorageName) -> Order:
    """Return the order of the original code, in torch operations in the storage dtype itself."""
    return Order(f"original-{storage}", storage=storage, anchor="last_key", native=True)


_CALIBRATED = (
    # With a narrow accumulator this is the naive loop, rounded after every term from first to last.
    Order("plain", anchor="last_key", step=1, gelu="storage"),
    Order(
        "split",
        sum=Sum("split", 4),
        norm=Norm(round_normalised=True),
        epilogue="separate",
        anchor="table",
        gelu="half_first",
    ),
    Order(
        "chunks",
        sum=Sum("chunks", 32),
        norm=Norm(affine=True),
        scale_on="queries",
        gelu="half_last",
    ),
    Order(
        "online",
        sum=Sum("split", 3, "reversed"),
        softmax=Softmax("online", 64, base="two"),
        norm=Norm("one_pass"),
        epilogue="separate",
    ),
    # The naive float32 loop, term by term: what a schedule without blocking does.
    Order("sequential", sum=Sum("chunks", 1), gelu="half_first"),
    Order("exact", compute="float64"),
)
_HELD_OUT = (
    Order(
        "tree",
        sum=Sum("tree", 64, "shuffled"),
        softmax=Softmax("online", 48),
        norm=Norm("welford", round_normalised=True),
        gelu="half_first",
        epilogue="separate",
    ),
    Order(
        "lanes",
        sum=Sum("lanes", 16, "halves"),
        softmax=Softmax(base="two"),
        norm=Norm("one_pass"),
        anchor="last_key",
        gelu="half_last",
    ),
)


def legitimate_orders(
    storage: StorageName,
    *,
    scores: Literal["storage", "float32"] = "storage",
    probabilities: Literal["storage", "float32"] = "storage",
    residual: Literal["storage", "fused"] = "storage",
    activation: Literal["storage", "fused"] = "storage",
    accumulator: Accumulator = "float32",
) -> tuple[Order, ...]:
    """Return the orders that limits are made of.

    Parameters
    ----------
    storage
        Precision in which the subject holds its tensors.
    scores, probabilities, residual, activation, accumulator
        Where the subject says that it rounds; see `Order`. The defaults are the original's.
    """
    return tuple(
        _declared(o, storage, scores, probabilities, residual, activation, accumulator)
        for o in _CALIBRATED
    )


_NOISE = (
    Order("noise-whole", norm=Norm(affine=True), scale_on="queries", anchor="last_key"),
    # Term by term costs a pass over the result for every term; eight at a time show the same noise
    # to a factor that calibration absorbs.
    Order(
        "noise-chunks",
        sum=Sum("chunks", 8),
        softmax=Softmax("online", 64, base="two"),
        norm=Norm("one_pass"),
        anchor="table",
        gelu="half_first",
    ),
)


def noise_orders(
    *,
    scores: Literal["storage", "float32"] = "storage",
    probabilities: Literal["storage", "float32"] = "storage",
    residual: Literal["storage", "fused"] = "storage",
    activation: Literal["storage", "fused"] = "storage",
) -> tuple[Order, ...]:
    """Return the orders that the noise of accumulation is estimated from, all in float32.

    Between them they make every choice by which some legitimate order rounds more than another, so
    that no such order lies many units of that noise away: an anchor far from the query, a variance
    that cancels, a scale on the queries, a sum in small pieces.

    Parameters
    ----------
    scores, probabilities, residual, activation
        Where the subject says that it rounds; see `Order`.
    """
    return tuple(
        replace(
            order,
            storage="float32",
            scores=scores,
            probabilities=probabilities,
            residual=residual,
            activation=activation,
        )
        for order in _NOISE
    )


def held_out_orders(
    storage: StorageName,
    *,
    scores: Literal["storage", "float32"] = "storage",
    probabilities: Literal["storage", "float32"] = "storage",
    residual: Literal["storage", "fused"] = "storage",
    activation: Literal["storage", "fused"] = "storage",
    accumulator: Accumulator = "float32",
) -> tuple[Order, ...]:
    """Return orders that no limit is made of, for measuring how often a limit cries wolf."""
    return tuple(
        _declared(o, storage, scores, probabilities, residual, activation, accumulator)
        for o in _HELD_OUT
    )


def _declared(
    order: Order,
    storage: StorageName,
    scores: Literal["storage", "float32"],
    probabilities: Literal["storage", "float32"],
    residual: Literal["storage", "fused"],
    activation: Literal["storage", "fused"],
    accumulator: Accumulator,
) -> Order:
    return replace(
        order,
        name=f"{order.name}-{storage}",
        storage=storage,
        scores=scores,
        probabilities=probabilities,
        residual=residual,
        activation=activation,
        accumulator=_held(order, accumulator),
    )


def _held(order: Order, declared: Accumulator) -> Accumulator:
    """Return what holds the sums of an order.

    A sum that is cut comes out too small by a share that whole sums show best; an implementation on
    such a unit may still add up short sums outside of it, and does so where a product has few rows.
    All other orders stand for those, also because cutting is a pass over the result for 16 terms.
    """
    if declared == "float32_cut" and (order.compute == "float64" or order.sum.kind != "whole"):
        return "float32"
    return declared
