"""ALiBi measured through the attention that is deployed, not through a function nobody runs.

With one-hot values an attention returns its own probabilities, and log-ratios of probabilities are
differences of scores. With queries and keys of zero those are differences of the bias. Far from the
query the bias would make probabilities vanish. There a window of keys at a time gets the same large
``q.k``: the others vanish instead, and within the window the log-ratios are again differences of
the bias alone, whatever the scale is. Windows that share a key make a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.statistics import LARGEST, Float
from harness.measure.widening import widened
from harness.subjects.protocol import Array

Attend = Callable[[Array, Array, Array], Array]
Only = Callable[[tuple[int, ...]], Attend]
"""From heads to an attention of these heads alone, in their order."""

# Probabilities this many nats below the nearest key's stay normal numbers in float16: a head whose
# bias falls by 1 nat in 256 keys still gives 1/256 * exp(-3) = 1.9e-4 > 6.1e-5.
_NEAR = 3.0
# What lies outside a window and the key after it shares exp(-8) for a key as near.
_MARGIN = 8.0
# Multiples of it fall evenly between 0 and 1.
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
# Lifted keys have this size, so that the queries stay small whatever the scale; a power of two
# changes no digit.
_KEY = 64.0
# What the nominal scale would give a lifted key, in nats; the least serves a scale 64 times that.
_LIFTS = (2.0, 0.25, 2.0**-5)
# A scale this far from the nominal one is no rounding of it in any storage dtype: bfloat16 keeps
# probabilities to 2^-9, so that 2 nats are measured to 0.4 %.
_FOREIGN = 0.1
_AT_ONCE = 2**25
"""Elements of the keys of one call: at the size of a 7B model all windows at once take 17 GB."""
PHASES = (0.2, 0.4, 0.6, 0.8)
"""Other roundings of the golden's bias, which belong to the envelope of a measured one."""


@dataclass(frozen=True)
class AttentionShape:
    """What a probe must know: heads, key/value heads, width of a head and the nominal scale."""

    n_heads: int
    kv_n_heads: int
    head_dim: int
    scale: float
    dtype: str

    @classmethod
    def of(cls, config: Any, dtype: str) -> AttentionShape:
        """Return the sizes of a config, parsed by either room."""
        return cls(config.n_heads, config.kv_n_heads, config.head_dim, config.scale, dtype)


def _log_probabilities(
    attend: Attend,
    shape: AttentionShape,
    queries: Float,
    keys: Float,
    query_length: int,
    wanted: list[list[int]],
) -> list[Float]:
    """Return log-probabilities of chosen keys for several rows of keys at once.

    Parameters
    ----------
    queries
        First component of every query, ``(heads,)``; the others are zero.
    keys
        First component of the keys, ``(rows, key)``.
    wanted
        For each row the positions whose probabilities are asked for.

    Returns
    -------
    list of numpy.ndarray
        For each row ``(heads, query, wanted)``.
    """
    length, dim = keys.shape[1], shape.head_dim
    dtype = BY_NAME[shape.dtype].numpy
    # A row of the batch shows as many probabilities as a head has components.
    pieces = [
        (row, asked[at : at + dim])
        for row, asked in enumerate(wanted)
        for at in range(0, len(asked), dim)
    ]
    found: list[list[Float]] = [[] for _ in wanted]
    together = max(1, _AT_ONCE // (length * shape.kv_n_heads * dim))
    for start in range(0, len(pieces), together):
        some = pieces[start : start + together]
        q = np.zeros((len(some), query_length, shape.n_heads, dim), dtype)
        q[..., 0] = queries.astype(dtype)
        k = np.zeros((len(some), length, shape.kv_n_heads, dim), dtype)
        v = np.zeros((len(some), length, shape.kv_n_heads, dim), dtype)
        for index, (row, asked) in enumerate(some):
            k[index, :, :, 0] = keys[row].astype(dtype)[:, None]
            for component, key in enumerate(asked):
                v[index, key, :, component] = 1
        context = widened(np.asarray(attend(q, k, v)))
        context = context.reshape(len(some), query_length, shape.n_heads, dim)
        # An underflow is an error of unknown size; the smallest double keeps it finite, and large.
        logs = np.log(np.maximum(context.transpose(0, 2, 1, 3), np.finfo(np.float64).tiny))
        for index, (row, asked) in enumerate(some):
            found[row].append(logs[index, :, :, : len(asked)])
    return [np.concatenate(parts, axis=-1) for parts in found]


def from_diagonal(table: Float) -> Float:
    """Return a table relative to each query's own key; keys after the query count as zero."""
    queries, keys = table.shape[-2:]
    own = np.arange(keys - queries, keys)
    relative = table - np.take_along_axis(table, own[None, :, None], axis=-1)
    hidden = np.arange(keys)[None, :] > own[:, None]
    result: Float = np.where(hidden, 0.0, relative)
    return result


def probe_bias(
    attend: Attend,
    shape: AttentionShape,
    slopes: Float,
    query_length: int,
    key_length: int,
    phase: float = 0.0,
    only: Only | None = None,
) -> Float:
    """Measure the bias that ``attend`` adds.

    Parameters
    ----------
    attend
        ``(q, k, v) -> context`` with q ``(batch, query, heads, dim)``, k and v ``(batch, key,
        kv_heads, dim)``; queries are the last of the keys.
    shape
        Sizes, nominal scale and storage dtype of the probe's arrays.
    slopes
        Expected fall of the bias per key, ``(heads,)``; a guess that only serves to choose windows.
        Any value gives the right answer as long as no probability underflows.
    phase
        Between 0 and 1; another one gives other probabilities, and so other roundings of the same
        bias. Which of them an attention meets hangs on the last bits of its scale.
    only
        An attention that has its heads one by one need not evaluate those a window is not made
        for; one key/value head serves all heads it is asked for.

    Returns
    -------
    numpy.ndarray
        ``(heads, query, key)`` float64, relative to the query's own position; zero at later keys.
    """
    nats = float(slopes.max()) * key_length + _MARGIN
    return _probe(attend, shape, slopes, query_length, key_length, phase, nats, only)


def _probe(
    attend: Attend,
    shape: AttentionShape,
    slopes: Float,
    query_length: int,
    key_length: int,
    phase: float,
    nats: float,
    only: Only | None,
) -> Float:
    nothing = np.zeros((1, key_length))
    every = [list(range(key_length))]
    quiet = _log_probabilities(
        attend, shape, np.zeros(shape.n_heads), nothing, query_length, every
    )[0]
    if query_length > 1 and _sees_the_future(quiet):
        # Later keys take probability from all others until they underflow. That is a fault of the
        # mask; the bias shows where there is no later key.
        result = np.zeros((shape.n_heads, query_length, key_length))
        for row in range(query_length):
            seen = key_length - query_length + row + 1
            alone = _probe(attend, shape, slopes, 1, seen, phase, nats, only)
            result[:, row, :seen] = alone[:, 0]
        return result
    result = from_diagonal(quiet)
    distance = _query_distance(query_length, key_length)
    far = [head for head in range(shape.n_heads) if slopes[head] * distance.max() > _NEAR]
    if not far:
        return result
    scale = _scale_in_force(attend, shape, result, query_length, key_length)
    lift = np.minimum(nats / scale / _KEY, LARGEST[shape.dtype])
    widths = {head: _width(float(slopes[head]), key_length) for head in far}
    for width in sorted(set(widths.values())):
        plan = _Windows(width, key_length, nats, phase)
        alike = tuple(head for head in far if widths[head] == width)
        chain = _chain(attend, shape, lift, query_length, plan, alike, only)
        for index, head in enumerate(alike):
            for row in range(query_length):
                near = np.flatnonzero(
                    (slopes[head] * distance[row] <= _NEAR) & (distance[row] >= 0)
                )
                edge = int(near[0])
                steps = chain[index, row, :edge] - chain[index, row, edge]
                result[head, row, :edge] = result[head, row, edge] + steps
    return result


def _width(slope: float, key_length: int) -> int:
    """Return how many keys a window spans: a power of four, so that heads share windows."""
    widest = min(_NEAR / slope, key_length - 1.0)
    return int(4 ** max(0.0, np.floor(np.log2(max(widest, 1.0)) / 2)))


@dataclass(frozen=True)
class _Windows:
    """Windows of ``width`` + 1 keys from the first key to the last, each sharing one with the next.

    The key after a window stands above every one by an amount of its own. Else all windows of a
    head would hold the same probabilities, and their roundings would add up along the chain; and
    above, so that it is the maximum which an attention may take off before it rounds.
    """

    width: int
    key_length: int
    nats: float
    phase: float

    def positions(self) -> list[list[int]]:
        last = self.key_length - 1
        starts = range(0, last, self.width)
        return [list(range(at, min(at + self.width, last) + 1)) for at in starts]

    def keys(self) -> Float:
        """Return the first component of every key, ``(windows, key)``."""
        windows = self.positions()
        result = np.zeros((len(windows), self.key_length))
        for row, window in enumerate(windows):
            result[row, window] = 1.0
            if window[-1] + 1 < self.key_length:
                above = (_GOLDEN * row + self.phase) % 1.0 * _NEAR
                result[row, window[-1] + 1] = 1.0 + above / self.nats
        return result * _KEY


def _chain(
    attend: Attend,
    shape: AttentionShape,
    lift: Float,
    query_length: int,
    plan: _Windows,
    heads: tuple[int, ...],
    only: Only | None,
) -> Float:
    """Measure the bias of some heads from window to window, relative to the first key.

    Returns ``(len(heads), query, key)``; keys after the query hold nothing that can be used.
    """
    windows = plan.positions()
    chosen = list(heads)
    if only is not None:
        attend, lift = only(heads), lift[chosen]
        shape = replace(shape, n_heads=len(chosen), kv_n_heads=1)
        chosen = list(range(len(chosen)))
    logs = _log_probabilities(attend, shape, lift, plan.keys(), query_length, windows)
    logs = [found[chosen] for found in logs]
    result = np.zeros((len(chosen), query_length, plan.key_length))
    for window, found in zip(windows, logs, strict=True):
        first = result[..., window[0], None]
        result[..., window[1:]] = first + found[..., 1:] - found[..., :1]
    return result


def _scale_in_force(
    attend: Attend, shape: AttentionShape, natural: Float, query_length: int, key_length: int
) -> Float:
    """Return the factor on ``q.k``, ``(heads,)``: the nominal one unless another is in force.

    One key before the last gets ``q.k`` of 2 nats by the nominal scale, and what comes of it is the
    scale. Under a larger one the own key begins to underflow, and less is lifted. Once a foreign
    scale is known, it is measured again with 2 nats of its own, as precisely as the nominal one.
    """
    dtype = BY_NAME[shape.dtype].numpy
    lifted = np.zeros((1, key_length))
    lifted[0, -2] = 1.0
    pair = [[key_length - 2, key_length - 1]]

    def measured(nats: float, scale: Float) -> tuple[Float, Float]:
        """Return the nats gained by the lifted key, and what was lifted."""
        unit = np.minimum(nats / scale, LARGEST[shape.dtype]).astype(dtype).astype(np.float64)
        logs = _log_probabilities(attend, shape, unit, lifted, query_length, pair)[0]
        return logs[:, -1, 0] - logs[:, -1, 1] - natural[:, -1, -2], unit

    nominal = np.full(shape.n_heads, shape.scale)
    result = np.full(shape.n_heads, np.nan)
    for nats in _LIFTS:
        gain, unit = measured(nats, nominal)
        result = np.where(np.isnan(result) & (np.abs(gain) <= 2 * _LIFTS[0]), gain / unit, result)
        if not np.isnan(result).any():
            break
    # A scale that cannot be seen, or grows with no bound, is left to the taps of the attention.
    foreign = (np.abs(result / shape.scale - 1.0) > _FOREIGN) & (result > 0)
    if not foreign.any():
        return nominal
    coarse = np.where(foreign, result, nominal)
    gain, unit = measured(_LIFTS[0], coarse)
    fine: Float = np.where(foreign & (gain > 0), gain / unit, coarse)
    return fine


def _sees_the_future(table: Float) -> bool:
    """Return whether a key after its query has any probability at all."""
    queries, keys = table.shape[-2:]
    later = np.arange(keys)[None, :] > np.arange(keys - queries, keys)[:, None]
    return bool((table[:, later] > np.log(np.finfo(np.float64).tiny)).any())


def _query_distance(query_length: int, key_length: int) -> Float:
    own = np.arange(key_length - query_length, key_length)
    return (own[:, None] - np.arange(key_length)[None, :]).astype(np.float64)
