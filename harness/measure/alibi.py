"""ALiBi measured through the attention that is deployed, not through a function nobody runs.

With one-hot values an attention returns its own probabilities, and log-ratios of probabilities are
differences of scores. With queries and keys of zero those are differences of the bias. Far from the
query the bias would make probabilities vanish, so there ``q.k`` is chosen to cancel the expected
bias; what is left over, with the known ``q.k`` taken off again, is the bias. The scale that the
attention really applies to ``q.k`` is measured first, so that a wrong scale is not read as a wrong
bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.statistics import Float
from harness.subjects.protocol import Array

Attend = Callable[[Array, Array, Array], Array]

# Probabilities this many nats below the nearest key's stay normal numbers in float16: a head whose
# bias falls by 1 nat in 256 keys still gives 1/256 * exp(-3) = 1.9e-4 > 6.1e-5.
_NEAR = 3.0


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
    attend: Attend, shape: AttentionShape, queries: Float, keys: Float, query_length: int
) -> Float:
    """Return log-probabilities ``(heads, query, key)`` of one-dimensional queries and keys."""
    length, dim = keys.shape[0], shape.head_dim
    batch = -(-length // dim)
    dtype = BY_NAME[shape.dtype].numpy
    q = np.zeros((batch, query_length, shape.n_heads, dim), dtype)
    q[..., 0] = queries.astype(dtype)
    k = np.zeros((batch, length, shape.kv_n_heads, dim), dtype)
    k[..., 0] = keys.astype(dtype)[None, :, None]
    v = np.zeros((batch, length, shape.kv_n_heads, dim), dtype)
    for index in range(length):
        v[index // dim, index, :, index % dim] = 1
    context = np.asarray(attend(q, k, v)).astype(np.float64)
    context = context.reshape(batch, query_length, shape.n_heads, dim)
    rows = context.transpose(2, 1, 0, 3).reshape(shape.n_heads, query_length, batch * dim)
    # An underflow is an error of unknown size; the smallest double keeps it finite and enormous.
    floor = np.finfo(np.float64).tiny
    result: Float = np.log(np.maximum(rows[..., :length], floor))
    return result


def from_diagonal(table: Float) -> Float:
    """Return a table relative to each query's own key; keys after the query count as zero."""
    queries, keys = table.shape[-2:]
    own = np.arange(keys - queries, keys)
    relative = table - np.take_along_axis(table, own[None, :, None], axis=-1)
    hidden = np.arange(keys)[None, :] > own[:, None]
    result: Float = np.where(hidden, 0.0, relative)
    return result


def probe_bias(
    attend: Attend, shape: AttentionShape, slopes: Float, query_length: int, key_length: int
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
        Expected fall of the bias per key, ``(heads,)``; a guess that only serves to cancel. Any
        value gives the right answer as long as no probability underflows.

    Returns
    -------
    numpy.ndarray
        ``(heads, query, key)`` float64, relative to the query's own position; zero at later keys.
    """
    dtype = BY_NAME[shape.dtype].numpy

    def held(values: Float) -> Float:
        return values.astype(dtype).astype(np.float64)

    heads = shape.n_heads
    nothing = np.zeros(key_length)
    natural = from_diagonal(
        _log_probabilities(attend, shape, np.zeros(heads), nothing, query_length)
    )
    if key_length < 2:
        return natural
    distance = np.arange(key_length - 1, -1, -1).astype(np.float64)

    # One key before the last gets q.k = 2 nats: what comes of it is the scale in force.
    unit = held(np.full(heads, 2.0 / shape.scale))
    lifted = nothing.copy()
    lifted[-2] = 1.0
    answer = from_diagonal(_log_probabilities(attend, shape, unit, lifted, query_length))
    scale = (answer[:, -1, -2] - natural[:, -1, -2]) / unit

    # A power of two keeps the keys' integers exact and inside the range of float16.
    step = 2.0 ** np.ceil(np.log2(max(key_length / 1024.0, 1.0)))
    queries = held(slopes / shape.scale * step)
    keys = held(distance / step)
    cancelled = _log_probabilities(attend, shape, queries, keys, query_length)
    known = (scale * queries)[:, None, None] * keys[None, None, :]
    far = from_diagonal(cancelled - known)

    near = slopes[:, None, None] * _query_distance(query_length, key_length)[None] <= _NEAR
    result: Float = np.where(near, natural, far)
    return result


def _query_distance(query_length: int, key_length: int) -> Float:
    own = np.arange(key_length - query_length, key_length)
    return (own[:, None] - np.arange(key_length)[None, :]).astype(np.float64)
