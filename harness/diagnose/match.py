"""The matched filter: which template an error looks like, if any.

Everything is in units of the noise that is expected of each element. A template is what a fault
adds to the golden. Named is the fault for which three questions are answered yes:

* Does the subject conform to the model *with* that fault? What is left after the template is judged
  by the calibrated limits of a healthy implementation.
* Is the coefficient of the projection 1, within what the legitimate orders show on that direction?
* Is it not 0 within the same bounds? Otherwise the template is too weak to say anything.

No threshold is typed: the first uses the limits of the verdict, the others the worst projection of
the orders, no less than what chance gives for so many templates, times the calibrated factor of
projections (``gain``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

import numpy as np

from harness.measure.statistics import Float


@dataclass(frozen=True)
class Template:
    """What a fault makes of a tap: ``expected`` is golden plus template, ``(rows, columns)``.

    ``orders`` are the legitimate evaluations of the model with the fault, made when they are asked
    for, where that is another model altogether with a noise of its own.
    """

    fault: str
    expected: Float
    orders: Callable[[], tuple[Float, ...]] | None = None


@dataclass(frozen=True)
class Scene:
    """One tap as it was observed.

    Attributes
    ----------
    observed, golden
        ``(rows, columns)`` float64.
    orders
        The legitimate evaluation orders there.
    noise
        From what a fault makes of the tap to the noise that is expected of each element then.
    ratio
        From the same to the worst statistic over its limit, if that were the golden: above 1 the
        subject does not conform to it.
    gain_factor
        Calibrated factor of a projection at this kind of tap.
    alpha
        Probability that chance exceeds a bound.
    around
        From a template with orders to the scene of the model with that fault.
    """

    observed: Float
    golden: Float
    orders: tuple[Float, ...]
    noise: Callable[[Float], Float]
    ratio: Callable[[Float, Float], float]
    gain_factor: float
    alpha: float
    around: Callable[[Template], Scene] | None = None

    @cached_property
    def healthy(self) -> Float:
        """What the orders differ by from the golden, ``(orders, elements)``; 0 if not finite."""
        # Every template is projected on it.
        differences = [np.where(np.isfinite(o), o - self.golden, 0.0).ravel() for o in self.orders]
        return np.stack(differences) if differences else np.zeros((0, self.golden.size))


@dataclass(frozen=True)
class Match:
    """How well one template fits.

    Attributes
    ----------
    fault
        Its name.
    coefficient
        Projection of the error on the template: 1 where the fault is, 0 where it is not.
    uncertainty
        What healthy implementations show instead of 0.
    explained
        Share of the squared error that the template explains at its best scale.
    ratio
        What is left after the template, over the limits of a healthy implementation; infinite where
        the template is not of the right size, and nothing was judged.
    left
        The same as a mean square.
    """

    fault: str
    coefficient: float
    uncertainty: float
    explained: float
    ratio: float
    left: float

    @property
    def fits(self) -> bool:
        """Whether the error is this fault and nothing else."""
        return self.of_its_size and self.ratio <= 1.0

    @property
    def of_its_size(self) -> bool:
        """Whether the error has as much of the fault as the fault itself."""
        near_one = abs(self.coefficient - 1.0) <= self.uncertainty
        return near_one and self.coefficient > self.uncertainty


def bound(orders: Sequence[float], templates: int, gain_factor: float, alpha: float) -> float:
    """Return how far a healthy error may reach along a unit template.

    Parameters
    ----------
    orders
        Projections of the legitimate orders on it.
    templates
        How many were tried.
    gain_factor, alpha
        See ``Scene``.
    """
    chance = -NormalDist().inv_cdf(alpha / (2.0 * max(templates, 1)))
    return gain_factor * max([chance, *(abs(value) for value in orders)])


def match(scene: Scene, templates: Sequence[Template]) -> tuple[tuple[Match, ...], Match | None]:
    """Return the faults that cannot be told apart from the best fit, and the nearest template.

    Returns
    -------
    tuple
        The matches that fit, best first, restricted to those within the noise of the best; and the
        template that explains most, whether it fits or not.
    """
    fitted: list[tuple[Match, Template]] = []
    nearest: Match | None = None
    for template in templates:
        found = _one(scene, template, len(templates))
        if found is None:
            continue
        one = found
        if nearest is None or one.explained > nearest.explained:
            nearest = one
        if one.fits:
            fitted.append((one, template))
    if not fitted:
        return (), nearest
    fitted.sort(key=lambda pair: pair[0].left)
    best, ours = fitted[0]
    noise = scene.noise(_finite(ours.expected, scene.golden))

    def distance(expected: Float) -> float:
        return _length(
            _finite(expected, scene.golden) - _finite(ours.expected, scene.golden), noise
        )

    reach = 2.0 * best.uncertainty * distance(scene.golden)
    return tuple(m for m, theirs in fitted if distance(theirs.expected) <= reach), best


def _one(scene: Scene, template: Template, count: int) -> Match | None:
    observed, expected = scene.observed, template.expected
    bad = ~np.isfinite(observed)
    if bool((bad != ~np.isfinite(expected)).any()):
        return None
    golden = scene.golden
    if bad.any():
        # Where both leave the range of the dtype there is no more to compare.
        observed, expected = _finite(observed, golden), _finite(expected, golden)
    noise = scene.noise(expected)
    error = (observed - golden) / noise
    direction = (expected - golden) / noise
    length = _length(direction)
    if length == 0.0:
        return None
    along = float(np.vdot(error, direction)) / length
    healthy = scene.healthy @ (direction / (noise * length)).ravel()
    size = _length(error)
    left = error - direction
    if template.orders is not None and scene.around is not None and along > length / 2.0:
        # Near enough to be this model: judged by its own noise.
        return _one(scene.around(template), replace(template, orders=None), count)
    found = Match(
        fault=template.fault,
        coefficient=along / length,
        uncertainty=bound(healthy.tolist(), count, scene.gain_factor, scene.alpha) / length,
        explained=(along / size) ** 2 if size > 0 else 0.0,
        ratio=math.inf,
        left=float((left * left).mean()),
    )
    # To judge what is left is the dearest step, and few templates are of the right size.
    return replace(found, ratio=scene.ratio(observed, expected)) if found.of_its_size else found


def _length(values: Float, noise: Float | float = 1.0) -> float:
    return math.sqrt(float(np.square(values / noise).sum()))


def _finite(values: Float, golden: Float) -> Float:
    result: Float = np.where(np.isfinite(values), values, golden)
    return result
