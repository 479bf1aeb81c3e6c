"""The base config again and again, with other weights and tokens: no healthy peer is flagged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.certify.bounds import upper_bound
from harness.peers.cell import Cell
from harness.peers.features import FEATURES, Feature
from harness.subjects.protocol import STORAGE_DTYPES

PREFIX = "base."
FIRST_SEED = 3_000_000
"""Neither calibration nor the certificate draws from here on."""


def is_healthy_case(name: str) -> bool:
    """Return whether a feature is the base config with other weights, ``base.N``."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal()


def feature_of(name: str) -> Feature:
    """Return a feature of the list, or the base config with the weights of ``base.N``."""
    if not name.startswith(PREFIX):
        return FEATURES[name]
    number = int(name.removeprefix(PREFIX))
    base = FEATURES["base"]
    exposure = replace(base.exposure, name=f"base-{number}", seed=FIRST_SEED + number)
    return Feature(name, exposure, base.length)


def healthy_questions(
    names: Sequence[str], count: int, dtypes: Sequence[Sequence[str]]
) -> list[tuple[str, Feature, str]]:
    """Return so many cases for each peer, whose dtypes take turns.

    Parameters
    ----------
    names
        Peers.
    count
        Cases of each.
    dtypes
        Of each peer, as in the registry.
    """
    result = []
    for number in range(count):
        for name, mine in zip(names, dtypes, strict=True):
            able = [dtype for dtype in STORAGE_DTYPES if dtype in mine]
            feature = feature_of(f"{PREFIX}{number}")
            result.append((name, feature, able[number % len(able)]))
    return result


@dataclass(frozen=True)
class Alarms:
    """How often a healthy peer was flagged.

    Attributes
    ----------
    peer, cases, flagged
        Whom, how many cases, and how many of them did not conform.
    at_most
        Bounds the rate, at 95 % confidence.
    """

    peer: str
    cases: int
    flagged: int
    at_most: float


def alarms(cells: Sequence[Cell]) -> tuple[Alarms, ...]:
    """Count what did not conform, by peer."""
    mine: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.feature.startswith(PREFIX):
            mine.setdefault(cell.peer, []).append(cell)
    return tuple(
        Alarms(peer, len(group), bad, upper_bound(bad, len(group)))
        for peer, group in mine.items()
        for bad in [sum(cell.state != "conforms" for cell in group)]
    )
