"""The deployed attention against itself: heads in other places, and a window of keys further on.

No golden is needed to know that both sides must be the same; the reference only tells how far two
correct evaluations of the two sides may lie apart.

*Heads.* A head is moved with its queries, keys and values, and gets the slope of the place that it
comes to. What this slope lacks is a multiple of the key's position, and a row constant that no
softmax sees: it is put into ``q.k``, in components kept free for it, so that the head has its own
slope again. What an attention does by the number of a head, beyond its slope, shows.

*Far window.* The same queries and keys behind many others, past ``max_seq_len``, whose ``q.k`` is
so low that they have no weight: the bias of a far window is that of a near one, up to a constant of
each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.compare import Proof, measure_difference
from harness.measure.oracle import Oracle
from harness.measure.records import Event, Failure, Skip
from harness.measure.statistics import Float
from harness.measure.taps import Place
from harness.subjects.calls import SubjectFailure, call_array
from harness.subjects.protocol import Array, path_capabilities

WINDOW = 40
"""Queries and keys: more than two vectors of a kernel, and no multiple of one."""
_FREE = 3
"""Components of a head that carry what a slope lacks: three of bfloat16 are 24 bits together."""
_FARTHEST = 4096
"""Most keys before the far window; a ``max_seq_len`` up to this is passed."""
_HIDDEN = 64.0
"""Nats below the others that a hidden key scores: e^-64 is nothing to a float32 sum."""
_LEAST_SCALE = 2.0**-9
"""With a smaller one, queries of `_HIDDEN` nats leave the range of float16."""


@dataclass(frozen=True)
class Sides:
    """Arguments of two calls that must give the same.

    Attributes
    ----------
    plain, other
        q ``(1, queries, heads, dim)``, k and v ``(1, keys, kv_heads, dim)``, storage dtype.
    back
        From the context of the other ``(1, queries, heads, dim)`` to that of the plain one.
    """

    plain: tuple[Array, Array, Array]
    other: tuple[Array, Array, Array]
    back: Callable[[Array], Array]


@dataclass(frozen=True)
class Relation:
    """One relation: its name in the report, after ``paths.``, what is the same, and its calls."""

    name: str
    meaning: str
    sides: Callable[[Any, Float, Any], Sides]


def _drawn(config: Any, keys: int) -> tuple[Float, Float, Float]:
    """Return q, k and v whose scores are of the size 1 whatever the scale, with free components."""
    random = np.random.default_rng(keys)
    heads, kv_heads, dim = config.n_heads, config.kv_n_heads, config.head_dim
    q = random.standard_normal((1, WINDOW, heads, dim)) / (config.scale * dim**0.5)
    k, v = (random.standard_normal((1, keys, kv_heads, dim)) for _ in range(2))
    q[..., :_FREE] = k[..., :_FREE] = 0.0
    return q, k, v


def moved_heads(config: Any) -> tuple[Array, Array]:
    """Return which head comes to each place, and which key head: groups reversed, heads turned."""
    group = config.n_heads // config.kv_n_heads
    keys = np.arange(config.kv_n_heads)[::-1]
    return (keys[:, None] * group + np.roll(np.arange(group), 1)).reshape(-1), keys


def _heads(config: Any, slopes: Float, dtype: Any) -> Sides:
    q, k, v = _drawn(config, WINDOW)
    heads, key_heads = moved_heads(config)
    moved, keys = q[:, :, heads].copy(), k[:, :, key_heads].copy()
    # Counted from the middle, so that the sums stay small; the difference is a row constant.
    keys[..., :_FREE] = (np.arange(WINDOW) - WINDOW // 2)[:, None, None]
    lacking = (slopes[heads] - slopes) / config.scale
    for component in range(_FREE):
        held = lacking.astype(dtype).astype(np.float64)
        moved[..., component] = held
        lacking = lacking - held
    return Sides(
        _stored((q, k, v), dtype),
        _stored((moved, keys, v[:, :, key_heads]), dtype),
        lambda context: context[:, :, np.argsort(heads)],
    )


def _far_window(config: Any, slopes: Float, dtype: Any) -> Sides:
    # No multiple of anything that a kernel counts keys by.
    before = min(config.max_seq_len, _FARTHEST) + 5
    q, k, v = _drawn(config, before + WINDOW)
    q[..., 0] = _HIDDEN / config.scale
    k[:, :before, :, 0] = -1.0
    return Sides(
        _stored((q, k[:, before:], v[:, before:]), dtype),
        _stored((q, k, v), dtype),
        lambda context: context,
    )


def _stored(arrays: tuple[Float, Float, Float], dtype: Any) -> tuple[Array, Array, Array]:
    q, k, v = (np.ascontiguousarray(array.astype(dtype)) for array in arrays)
    return q, k, v


RELATIONS: tuple[Relation, ...] = (
    Relation("heads", "heads in other places, with their slopes", _heads),
    Relation("far-window", "behind hidden keys, past max_seq_len", _far_window),
)


def split_relations(
    offers: frozenset[str], config: Any
) -> tuple[tuple[Relation, ...], tuple[Skip, ...]]:
    """Return the relations that a subject and a config admit, and why the others do not apply."""
    chosen, left = [], []
    for relation in RELATIONS:
        if "attend" not in offers:
            left.append(Skip("path", relation.name, "the subject has no attend()"))
        elif config.head_dim <= _FREE:
            left.append(Skip("path", relation.name, f"heads of {_FREE} components or fewer"))
        elif config.scale < _LEAST_SCALE:
            left.append(Skip("path", relation.name, f"softmax_scale is below {_LEAST_SCALE}"))
        elif relation.name == "heads" and config.n_heads == 1:
            left.append(Skip("path", relation.name, "there is one head"))
        else:
            chosen.append(relation)
    return tuple(chosen), tuple(left)


def relation_events(
    oracle: Oracle,
    subject: Any,
    progress: Callable[[str], None] = lambda text: None,
    proved: Proof | None = None,
) -> Iterator[Event]:
    """Yield a measurement, a failure or a skip for each of `RELATIONS`.

    Parameters
    ----------
    oracle
        Makes the noise by which two correct evaluations differ.
    subject
        Of protocol 2, with ``attend``; without it every relation is skipped, with the reason.
    proved
        See `measure_difference`.
    """
    from reference.alibi import slopes
    from reference.model import attend

    config = oracle.config
    chosen, left = split_relations(path_capabilities(subject), config)
    yield from left
    rates = slopes(config.n_heads, config.alibi_bias_max).numpy() * float(config.alibi)
    shape = (1, WINDOW, config.n_heads, config.head_dim)

    def evaluated(order: Any, arrays: tuple[Array, Array, Array]) -> Array:
        context = attend(config, order, *(oracle.tensor(array) for array in arrays))
        return np.asarray(context.detach().cpu().double().numpy()).reshape(shape)

    for relation in chosen:
        progress(f"attention: {relation.name}")
        place = Place(None, f"paths.{relation.name}")
        sides = relation.sides(config, rates, BY_NAME[oracle.storage].numpy)
        try:
            base, other = (
                call_array("attend", subject.attend, arrays, shape)
                for arrays in (sides.plain, sides.other)
            )
        except SubjectFailure as failure:
            yield Failure(place, "attention", str(failure), failure.detail)
            continue
        orders = [evaluated(order, sides.plain) for order in oracle.orders]
        orders += [sides.back(evaluated(order, sides.other)) for order in oracle.orders]
        golden = evaluated(oracle.golden, sides.plain)
        seen, expected, truth = map(_merged, (sides.back(other), base, golden))
        others = [_merged(order) for order in orders]
        yield measure_difference(place, "attention", seen, expected, truth, others, proved)


def _merged(context: Array) -> Array:
    """Return heads side by side, ``(1, queries, heads * dim)``."""
    return context.reshape(*context.shape[:2], -1)
