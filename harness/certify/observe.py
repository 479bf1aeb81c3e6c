"""From one check to what a certificate keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from harness.judge.verdict import Row
from harness.measure.oracle import flat
from harness.pipeline import Evidence
from harness.rival import verdicts


@dataclass(frozen=True)
class Observation:
    """Margins and the verdicts of the published rules."""

    ratio: float | None
    ratios: dict[str, float]
    rules: dict[str, bool]


def observe(evidence: Evidence) -> Observation:
    """Return the margins of a check, and what the published rules say of its logits."""
    worst = margins(evidence.rows)
    largest = max(worst.values(), default=math.nan)
    return Observation(
        largest if math.isfinite(largest) else None,
        {cell: ratio for cell, ratio in worst.items() if math.isfinite(ratio)},
        dict(getattr(evidence.walk, _HEARD, {})),
    )


_HEARD = "_published_rules"


def margins(rows: Iterable[Row]) -> dict[str, float]:
    """Return the largest statistic over its limit, by ``MODE TAP`` with layers taken together."""
    worst: dict[str, float] = {}
    for row in rows:
        measured = row.measurement
        if measured.exact:
            continue
        cell = f"{measured.mode} {measured.place.tap}"
        worst[cell] = max(worst.get(cell, 0.0), row.ratio)
    return worst


@cache
def remember() -> Callable[[], None]:
    """Let the oracle answer repeated questions from memory, in this process.

    Golden and orders of a checkpoint are the same for every fault planted in the subject. That
    changes no number.

    Returns
    -------
    callable
        Forgets everything, before another checkpoint fills the memory.
    """
    from harness.measure import oracle, run

    def digest(value: Any) -> Any:
        if hasattr(value, "detach"):
            array = value.detach().cpu().numpy()
            return str(array.dtype), array.shape, hash(array.tobytes())
        return value

    memories: list[dict[Any, Any]] = []

    def wrap(owner: Any, name: str, key: Any) -> None:
        plain: Any = getattr(owner, name)
        kept: dict[Any, Any] = {}
        memories.append(kept)

        def remembered(self: Any, *arguments: Any) -> Any:
            at = (*key(self), *(digest(argument) for argument in arguments))
            if at not in kept:
                kept[at] = plain(self, *arguments)
            return kept[at]

        setattr(owner, name, remembered)

    # The stream is part of the key; two checkpoints of one config have different streams.
    wrap(oracle.Part, "chain", lambda p: (p.part, p._oracle.storage, repr(p._oracle.config)))
    wrap(run.Walk, "_order_bias", lambda w: (w.oracle.storage, repr(w.config)))

    plain: Any = run.Walk._logits

    def heard(self: Any, stream: Any, logits: Any, chained: Any) -> Any:
        """Ask the published rules while the logits are there; every case has to pass."""
        held = self.__dict__.setdefault(_HEARD, {})
        tensors = (flat(a) for a in (logits, stream.golden_logits, stream.order_logits[0]))
        for rule, passed in verdicts(*tensors).items():
            held[rule] = held.get(rule, True) and passed
        yield from plain(self, stream, logits, chained)

    run.Walk._logits = heard  # type: ignore[method-assign]

    def forget() -> None:
        for kept in memories:
            kept.clear()

    return forget
