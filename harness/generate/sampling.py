"""From logits to the next token: greedy, or drawn with temperature and top-p from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    temperature
        What logits are divided by; 0 takes the largest, the first of equals.
    top_p
        Draw from the fewest tokens whose probabilities reach this sum.
    seed
        Of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(
                "cannot be used",
                where="--temperature",
                expected="0 (greedy) or a positive number",
                found=self.temperature,
            )
        if not 0 < self.top_p <= 1:
            raise BadInput(
                "cannot be used", where="--top-p", expected="above 0, at most 1", found=self.top_p
            )
        if self.top_p < 1 and self.temperature == 0:
            raise BadInput(
                "has no effect on greedy generation", where="--top-p", hint="set --temperature"
            )
        if self.seed < 0:
            raise BadInput("cannot be used", where="--seed", expected="0 or more", found=self.seed)

    def generator(self) -> np.random.Generator:
        """Return the source of the draws."""
        return np.random.default_rng(self.seed)


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Return what is drawn from, (vocab,) float64, with zeros for all that top-p leaves out."""
    wide = np.asarray(logits, np.float64) / sampling.temperature
    p = np.exp(wide - wide.max())
    p /= p.sum()
    if sampling.top_p < 1:
        # Stable, so that equal probabilities are kept in order of their ids on every machine.
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0.0
        p /= p.sum()
    result: NDArray[np.float64] = p
    return result


def choose(logits: NDArray[Any], sampling: Sampling, draws: np.random.Generator) -> int:
    """Return the next token of logits (vocab,).

    Raises
    ------
    BadInput
        If the logits are not finite: then there is nothing to choose by.
    """
    if not np.isfinite(logits).all():
        raise BadInput(
            "the logits are not finite",
            where="generate",
            hint="`mpt-conform check` says where this begins",
        )
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    return int(draws.choice(len(logits), p=probabilities(logits, sampling)))
