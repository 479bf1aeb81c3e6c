"""A generation against full recomputation and against the reference, token for token.

Both are asked along the path that was generated: one near tie, where two correct evaluations may
choose differently, must not make strangers of all tokens after it. A token that differs is a near
tie if the reference's gap between both candidates is no more than what two logits may lose to each
other by the noise of the legitimate evaluation orders at that position; the port's own error
excuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import BadInput
from harness.generate.sampling import Sampling
from harness.measure.oracle import Oracle
from harness.measure.paths import evaluate
from harness.subjects.protocol import Array


@dataclass(frozen=True)
class Disagreement:
    """A new token that another evaluation would not have chosen.

    Attributes
    ----------
    position
        Among all ids, the prompt's included.
    token, other
        What was generated, and what the other evaluation prefers.
    by
        ``"recomputation"`` or ``"reference"``.
    gap
        By how much the reference's float64 logits put ``other`` above ``token``; negative where
        they agree with the token.
    noise
        Largest distance of a legitimate order's logits from the reference's at this position.
    near_tie
        Whether ``gap`` is at most twice the noise.
    """

    position: int
    token: int
    other: int
    by: str
    gap: float
    noise: float
    near_tie: bool


@dataclass(frozen=True)
class Agreement:
    """How many new tokens other evaluations would have chosen.

    Attributes
    ----------
    tokens
        New tokens, all compared.
    recomputation, reference
        Of these, what the port without a cache and the float64 reference choose too.
    near_ties
        Differing ones that the noise excuses, by ``recomputation`` and ``reference``.
    disagreements
        Every differing one, excused or not.
    """

    tokens: int
    recomputation: int
    reference: int
    near_ties: dict[str, int]
    disagreements: tuple[Disagreement, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing but near ties differs."""
        return all(one.near_tie for one in self.disagreements)

    @property
    def summary(self) -> str:
        """One line."""
        parts = [
            f"{found} of {self.tokens} tokens as {name} ({self.near_ties[key]} near ties)"
            for found, name, key in (
                (self.recomputation, "recomputed in full", "recomputation"),
                (self.reference, "the float64 reference", "reference"),
            )
        ]
        return "; ".join(parts)


def require_greedy(sampling: Sampling) -> None:
    """Refuse to verify what was drawn.

    Raises
    ------
    BadInput
        If the temperature is not 0.
    """
    if sampling.temperature != 0:
        raise BadInput(
            "compares the likeliest tokens, and these are drawn",
            where="--verify",
            hint="leave out --temperature",
        )


def verify(subject: Any, oracle: Oracle, prompt: Sequence[int], made: Sequence[int]) -> Agreement:
    """Compare new tokens with what the port without a cache and the reference choose.

    Parameters
    ----------
    subject
        Its ``forward`` recomputes everything.
    oracle
        Of the same checkpoint, storage dtype and rounding.
    prompt, made
        Ids before and after; neither is empty.
    """
    ids = np.array([[*prompt, *made][:-1]], np.int32)
    first = len(prompt) - 1
    golden, orders = evaluate(oracle, ids)
    truth = golden[0, first:]
    noise = np.max([np.abs(order[0, first:] - truth).max(axis=1) for order in orders], axis=0)
    chosen = np.array(made)
    others = {
        "recomputation": np.asarray(subject.forward(ids))[0, first:].argmax(axis=1),
        "reference": truth.argmax(axis=1),
    }
    found = tuple(
        one
        for by, other in others.items()
        for one in _differing(by, chosen, other, truth, noise, len(prompt))
    )
    return Agreement(
        tokens=len(made),
        recomputation=int((others["recomputation"] == chosen).sum()),
        reference=int((others["reference"] == chosen).sum()),
        near_ties={by: sum(one.near_tie for one in found if one.by == by) for by in others},
        disagreements=found,
    )


def _differing(
    by: str, chosen: Array, other: Array, truth: Array, noise: Array, first: int
) -> list[Disagreement]:
    found = []
    for at in np.flatnonzero(other != chosen):
        gap = float(truth[at, other[at]] - truth[at, chosen[at]])
        found.append(
            Disagreement(
                position=first + int(at),
                token=int(chosen[at]),
                other=int(other[at]),
                by=by,
                gap=gap,
                noise=float(noise[at]),
                near_tie=abs(gap) <= 2 * float(noise[at]),
            )
        )
    return found
