"""From arrays to a measurement: the only place where a subject's numbers meet the golden's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from harness.measure.alibi import from_diagonal
from harness.measure.fast import NARROW, look
from harness.measure.oracle import flat, table
from harness.measure.records import LogitSummary, Measurement, Mode
from harness.measure.statistics import (
    AT_LEAST,
    LARGEST,
    Float,
    Ruler,
    accumulation,
    noise_scale,
    relative_error,
    row_noise,
    shares,
)
from harness.measure.taps import Place

Proof = Callable[[Measurement], bool]
"""Whether bounds on the statistics prove that a tap conforms."""
WORTH = 1 << 14
"""Elements below which a first look costs as much as the exact statistics."""


def measure_tap(
    mode: Mode,
    place: Place,
    prompt: str,
    observed: Any,
    golden: Any,
    orders: Sequence[Any],
    dtype: str,
    *,
    exact: bool = False,
    heads: int | None = None,
    unrounded: Sequence[Any] = (),
    proved: Proof | None = None,
) -> Measurement:
    """Measure one tap against its golden, and the evaluation orders beside it.

    Parameters
    ----------
    observed, golden, orders
        Arrays or tensors of one shape, features last.
    dtype
        Storage dtype.
    exact
        Nothing is rounded at this tap.
    heads
        Number of heads that the columns belong to, where they do.
    unrounded
        Evaluations without rounding to storage, where there are any.
    proved
        Asked after a first look at a large tensor in float16 or bfloat16, whose measurement holds
        bounds: what the subject's error does not exceed, and what the orders' errors reach. If
        that is enough, the exact statistics are not computed. Without it, they always are.
    """
    if proved is not None and not exact and dtype in NARROW:
        first = _first_look(mode, place, prompt, observed, golden, orders, dtype, heads, unrounded)
        if first is not None and proved(first):
            return first
    seen, truth = flat(observed), flat(golden)
    others = [flat(order) for order in orders]
    noise = noise_scale(truth, others, dtype, [flat(value) for value in unrounded])
    ruler = Ruler.of(truth, noise)
    result = ruler.measure(seen, truth)
    return Measurement(
        mode=mode,
        place=place,
        prompt=prompt,
        rows=truth.shape[0],
        columns=truth.shape[1],
        exact=exact,
        observed=result,
        orders=tuple(ruler.measure(other, truth) for other in others),
        relative=relative_error(seen, truth),
        returned=dtype_name(observed),
        length=int(observed.shape[-2]),
        head=_worst_head(seen, truth, result.worst_row, heads) if heads else None,
        overflow=int((np.abs(truth) > LARGEST[dtype]).sum()),
        constant=bool(truth.size > 1 and (truth == truth.flat[0]).all()),
        shares=shares(truth, noise, dtype),
    )


def _first_look(
    mode: Mode,
    place: Place,
    prompt: str,
    observed: Any,
    golden: Any,
    orders: Sequence[Any],
    dtype: str,
    heads: int | None,
    unrounded: Sequence[Any],
) -> Measurement | None:
    """Measure one tap by bounds; ``None`` where float32 cannot hold what is to be said of it."""
    truth = flat(golden)
    seen, others = table(observed), [table(order) for order in orders]
    if truth.size < WORTH:
        return None
    joined = accumulation(truth, others, dtype, [table(value) for value in unrounded])
    found = look(truth, (seen, *others), dtype, joined)
    first, *rest = found.screens
    result = first.at_most()
    if not found.largest <= LARGEST[dtype] or not found.relative[0] >= 0:
        return None
    row = result.worst_row
    worst = slice(row, row + 1)
    return Measurement(
        mode=mode,
        place=place,
        prompt=prompt,
        rows=truth.shape[0],
        columns=truth.shape[1],
        exact=False,
        observed=result,
        orders=tuple(screen.at_least() for screen in rest),
        relative=found.relative[0],
        returned=dtype_name(observed),
        length=int(observed.shape[-2]),
        head=_worst_head(seen[worst].astype(np.float64), truth[worst], 0, heads) if heads else None,
        constant=bool((truth == truth.flat[0]).all()),
        shares=found.shares,
    )


def dtype_name(array: Any) -> str:
    """Return the name of an array's dtype, as the report shows it."""
    return str(getattr(getattr(array, "dtype", None), "name", "float64"))


def _worst_head(seen: Float, truth: Float, row: int, heads: int) -> int:
    error = np.nan_to_num(np.abs(seen[row] - truth[row]), nan=np.inf).reshape(heads, -1)
    return int(error.max(axis=1).argmax())


def measure_difference(
    place: Place,
    prompt: str,
    deployed: Any,
    chained: Any,
    golden: Any,
    orders: Sequence[Any],
    proved: Proof | None = None,
) -> Measurement:
    """Measure the deployed result against the tapped chain of the same subject.

    Two correct evaluations may differ as much as two of the legitimate orders do, so that every
    pair of orders makes one entry of the limit.

    Parameters
    ----------
    deployed, chained, golden, orders
        Arrays or tensors of one shape, features last.
    proved
        Asked after each pair of orders, of which the others then only count: they could but widen
        the limit. Without it, all are measured.
    """
    seen, base, truth = flat(deployed), flat(chained), flat(golden)
    others = [flat(order) for order in orders]
    ruler = Ruler.of(truth, row_noise(truth, others))
    pairs = list(combinations(others, 2))
    known = [AT_LEAST] * len(pairs)
    found = Measurement(
        mode="deployed",
        place=place,
        prompt=prompt,
        rows=truth.shape[0],
        columns=truth.shape[1],
        exact=False,
        observed=ruler.measure(seen, base),
        orders=(),
        relative=relative_error(seen, base),
        returned=dtype_name(deployed),
        length=int(deployed.shape[-2]),
    )
    for at, (one, other) in enumerate(pairs):
        known[at] = ruler.measure(other, one)
        if proved is not None and proved(replace(found, orders=tuple(known))):
            break
    return replace(found, orders=tuple(known))


def measure_bias(
    prompt: str, observed: Float, golden: Float, orders: Sequence[Float], returned: str
) -> Measurement:
    """Measure an ALiBi bias as differences along its key axis: a row constant means nothing.

    Parameters
    ----------
    observed, golden, orders
        ``(heads, query, key)`` float64. Rows of the error matrix are head by query.
    """

    def steps(bias: Float) -> Float:
        # Relative to the query's own key: every key keeps its own error, not its neighbour's too.
        relative = from_diagonal(bias)
        return np.ascontiguousarray(relative).reshape(-1, relative.shape[-1])

    seen, truth = steps(observed), steps(golden)
    others = [steps(order) for order in orders]
    ruler = Ruler.of(truth, row_noise(truth, others))
    result = ruler.measure(seen, truth)
    return Measurement(
        mode="alibi",
        place=Place(None, "alibi"),
        prompt=prompt,
        rows=truth.shape[0],
        columns=truth.shape[1],
        exact=False,
        observed=result,
        orders=tuple(ruler.measure(other, truth) for other in others),
        relative=relative_error(seen, truth),
        returned=returned,
        length=observed.shape[-2],
        head=result.worst_row // observed.shape[-2],
    )


def summarise_logits(
    prompt: str, ids: Any, observed: Any, golden: Any, orders: Sequence[Any]
) -> LogitSummary | None:
    """Return what the logits mean to people, or ``None`` if they are not finite.

    A disagreement is a near tie if the golden gap is no more than two logits may lose to each other
    by the noise of the legitimate orders at that position; a subject's own error excuses nothing.
    """
    seen, truth = flat(observed), flat(golden)
    if not np.isfinite(seen).all():
        return None

    def log_softmax(logits: Float) -> Float:
        shifted = logits - logits.max(axis=1, keepdims=True)
        result: Float = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    log_seen, log_truth = log_softmax(seen), log_softmax(truth)
    divergence = (np.exp(log_truth) * (log_truth - log_seen)).sum(axis=1)
    best, chosen = truth.argmax(axis=1), seen.argmax(axis=1)
    rows = np.arange(truth.shape[0])
    wrong = best != chosen
    gap = truth[rows, best] - truth[rows, chosen]
    noise = np.max([np.abs(flat(order) - truth).max(axis=1) for order in orders], axis=0)
    kept = min(5, seen.shape[1])
    top = np.argpartition(-seen, kept - 1, axis=1)[:, :kept]
    tokens = np.asarray(ids)
    following = tokens[:, 1:].reshape(-1)
    positions = np.arange(tokens.size).reshape(tokens.shape)[:, :-1].reshape(-1)
    no_loss = float("nan")
    return LogitSummary(
        prompt=prompt,
        positions=truth.shape[0],
        top1_agree=int((~wrong).sum()),
        top5_agree=int((top == best[:, None]).any(axis=1).sum()),
        near_ties=int((wrong & (gap <= 2 * noise)).sum()),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        golden_loss=float(-log_truth[positions, following].mean()) if positions.size else no_loss,
        subject_loss=float(-log_seen[positions, following].mean()) if positions.size else no_loss,
    )
