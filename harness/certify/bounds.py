"""What a count of events says about their rate."""

from __future__ import annotations

import math

CONFIDENCE = 0.95


def upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact one-sided upper bound of a rate, after Clopper and Pearson (1934).

    The largest rate under which as few events as these, or fewer, have a probability of
    ``1 - confidence``. Without an event it is ``1 - (1 - confidence) ** (1 / trials)``, about
    3 / trials.

    Parameters
    ----------
    events, trials
        How often it happened, of how many independent chances.
    confidence
        Between 0 and 1.

    Raises
    ------
    ValueError
        If there was no trial, or there were more events than trials.
    """
    if trials < 1 or not 0 <= events <= trials:
        raise ValueError(f"expected 0 <= events <= trials and a trial, found {events} of {trials}")
    if events == trials:
        return 1.0
    low, high = 0.0, 1.0
    # Halving the interval 60 times leaves less than the spacing of float64 near 1.
    for _ in range(60):
        middle = (low + high) / 2.0
        if at_most(events, trials, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def at_most(events: int, trials: int, rate: float) -> float:
    """Return the probability of no more than so many events."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return float(events >= trials)
    total = 0.0
    for count in range(events + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        chance = count * math.log(rate) + (trials - count) * math.log1p(-rate)
        total += math.exp(ways + chance)
    return min(total, 1.0)
