"""Where a subject first diverges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.judge.verdict import Row
from harness.measure.records import Failure
from harness.measure.taps import Place

# Steps judged alone point at the culprit; what is chained only shows where it was first seen.
_RANK = {"alibi": 0, "local": 0, "teacher-forced": 1, "free-running": 2, "deployed": 3}


@dataclass(frozen=True)
class Divergence:
    """The first divergence in order of evaluation.

    Attributes
    ----------
    tap
        Module path of the original checkpoint, ``alibi`` or ``logits``.
    layer
        Block number; 0 for ``alibi``, which enters with the first block; ``None`` at both ends.
    head, token, row
        Where the error is largest: head and token position where they apply, batch row.
    mode, case, statistic
        How it was seen.
    observed, limit
        In units of the expected rounding noise.
    reason
        A failed call's message instead of numbers.
    """

    tap: str
    layer: int | None
    mode: str
    case: str
    head: int | None = None
    token: int | None = None
    row: int | None = None
    statistic: str = ""
    observed: float | None = None
    limit: float | None = None
    reason: str = ""


def _layer(place: Place) -> int | None:
    return 0 if place.tap == "alibi" else place.layer


def first_divergence(
    rows: Sequence[Row], failures: Sequence[Failure], order: Sequence[Place]
) -> Divergence | None:
    """Return the first divergence, or ``None``.

    Parameters
    ----------
    rows, failures
        Everything judged.
    order
        Taps in order of evaluation.
    """
    position = {place: index for index, place in enumerate(order)}
    after = len(position)
    embedding = {place for place in order if place.tap in ("transformer.wte", "transformer.wpe")}

    def rank(row: Row) -> tuple[int, int]:
        place = row.measurement.place
        by_mode = 0 if place in embedding else _RANK[row.measurement.mode]
        return by_mode, position.get(place, after)

    diverging = [row for row in rows if row.diverges]
    best = min(diverging, key=rank, default=None)
    failed = min(failures, key=lambda f: position.get(f.place, after), default=None)
    if failed is not None:
        mine = (0, position.get(failed.place, after))
        if best is None or mine < rank(best):
            return Divergence(
                failed.place.path,
                _layer(failed.place),
                "call",
                failed.prompt,
                reason=failed.reason,
            )
    if best is None:
        return None
    measured = best.measurement
    batch_row, token = divmod(measured.observed.worst_row, measured.length)
    return Divergence(
        tap=measured.place.path,
        layer=_layer(measured.place),
        mode=measured.mode,
        case=measured.prompt,
        head=measured.head,
        token=token,
        row=None if measured.mode == "alibi" else batch_row,
        statistic=best.statistic,
        observed=best.observed,
        limit=best.limit,
        reason=best.note,
    )
