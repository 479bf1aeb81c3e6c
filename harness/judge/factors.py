"""The safety factors: data made by calibration, never typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import msgspec

from harness.errors import ConformanceError

FILE = "factors.json"


@dataclass(frozen=True)
class Factors:
    """How far beyond the worst legitimate order a healthy implementation may lie.

    Attributes
    ----------
    alpha
        Probability that a floor of one tap is exceeded by independent rounding errors.
    factors
        By mode, storage dtype and statistic.
    record
        The evidence: runs, checkpoints, seeds and worst healthy ratios of the calibration.
    """

    alpha: float
    factors: Mapping[str, Mapping[str, Mapping[str, float]]]
    record: Mapping[str, Any]

    def get(self, mode: str, dtype: str, statistic: str) -> float:
        """Return one factor.

        Raises
        ------
        ConformanceError
            If calibration has not covered this combination: then nothing may be judged.
        """
        try:
            return self.factors[mode][dtype][statistic]
        except KeyError:
            raise ConformanceError(
                "no calibrated factor",
                where=f"{FILE}: {mode}/{dtype}/{statistic}",
                hint="run mpt-conform calibrate",
            ) from None


@lru_cache(maxsize=1)
def shipped() -> Factors:
    """Return the factors that came with the package."""
    data = resources.files("harness.judge").joinpath(FILE).read_bytes()
    return msgspec.json.decode(data, type=Factors)
