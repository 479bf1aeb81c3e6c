"""The published rules on the same tensors: what others would have said.

Each takes the observed array, the golden and, where the rule compares with it, a healthy evaluation
in float16, and returns whether the rule *passes*. None of them decides anything here; they make the
head-to-head table of the certificate. Anything that is not finite fails every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from harness.measure.statistics import Float

Check = Callable[[Float, Float, Float], bool]


@dataclass(frozen=True)
class Rule:
    """One published rule.

    Attributes
    ----------
    name
        As the table shows it.
    source
        Who compares like this.
    passes
        ``(observed, golden, reference) -> bool`` on arrays ``(rows, columns)`` of float64; the
        reference is a healthy evaluation in the storage dtype.
    """

    name: str
    source: str
    passes: Check


def all_close(rtol: float, atol: float) -> Check:
    """Return elementwise ``|observed - golden| <= atol + rtol * |golden|``."""

    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        return bool((np.abs(observed - golden) <= atol + rtol * np.abs(golden)).all())

    return passes


def cosine(least: float) -> Check:
    """Return the rule that the angle between the whole tensors is small."""

    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        norm = float(np.linalg.norm(observed) * np.linalg.norm(golden))
        return norm > 0 and float((observed * golden).sum()) / norm >= least

    return passes


def normalised_error(most: float) -> Check:
    """Return the rule on squared error over squared golden."""

    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        energy = float(np.square(golden).sum())
        return energy > 0 and float(np.square(observed - golden).sum()) / energy < most

    return passes


def top_contains(count: int) -> Check:
    """Return the rule that the golden's best column is among the observed best, in every row."""

    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        kept = min(count, observed.shape[1])
        best = np.argpartition(-observed, kept - 1, axis=1)[:, :kept]
        return bool((best == golden.argmax(axis=1)[:, None]).any(axis=1).all())

    return passes


def times_reference(most: float) -> Check:
    """Return the rule that the error is no more than so many times a healthy evaluation's."""

    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        mine = float(np.square(observed - golden).mean())
        return mine <= most**2 * float(np.square(reference - golden).mean())

    return passes


def _finite_only(check: Check) -> Check:
    def passes(observed: Float, golden: Float, reference: Float) -> bool:
        return bool(np.isfinite(observed).all()) and check(observed, golden, reference)

    return passes


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: Rule(rule.name, rule.source, _finite_only(rule.passes))
        for rule in (
            Rule(
                "assert_close float16",
                "torch.testing.assert_close: rtol 1e-3, atol 1e-5",
                all_close(1e-3, 1e-5),
            ),
            Rule("allclose 1e-2/1e-3", "elementwise rtol 1e-2, atol 1e-3", all_close(1e-2, 1e-3)),
            Rule("allclose 1e-2/1.0", "elementwise rtol 1e-2, atol 1.0", all_close(1e-2, 1.0)),
            Rule("cosine >= 0.99", "cosine of the whole tensor", cosine(0.99)),
            Rule("NMSE < 1e-2", "squared error over squared golden", normalised_error(1e-2)),
            Rule("top-5", "the golden's best token among the best five", top_contains(5)),
            Rule(
                "float64 x 2",
                "RMS against float64 at most twice the float16 reference's",
                times_reference(2.0),
            ),
        )
    }
)
"""By name, in the order of the table."""


def verdicts(observed: Float, golden: Float, reference: Float) -> dict[str, bool]:
    """Return which rules pass.

    Parameters
    ----------
    observed, golden, reference
        Arrays of one shape, features last.

    Raises
    ------
    ValueError
        If the shapes differ or nothing is there to compare.
    """
    shapes = {np.shape(array) for array in (observed, golden, reference)}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise ValueError(f"expected three arrays of one shape and not empty, found {shapes}")
    flat = [
        np.asarray(a).astype(np.float64).reshape(-1, np.shape(a)[-1])
        for a in (observed, golden, reference)
    ]
    return {name: rule.passes(*flat) for name, rule in RULES.items()}
