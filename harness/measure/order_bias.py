"""The ALiBi bias as the golden has it, and as an evaluation order shows it to the probe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.measure.alibi import Attend, AttentionShape, probe_bias
from harness.measure.statistics import Float
from harness.subjects.protocol import Array

if TYPE_CHECKING:
    from harness.measure.oracle import Oracle
    from reference.orders import Order


def reference_bias(config: Any, queries: int, keys: int) -> Array:
    """Return the expected bias ``(heads, query, key)`` in float64, zero without ALiBi."""
    from reference import alibi

    if not config.alibi:
        return np.zeros((config.n_heads, queries, keys))
    return np.asarray(
        alibi.bias(config.n_heads, config.alibi_bias_max, queries, keys).double().numpy()
    )


def expected_slopes(config: Any) -> Float:
    """Return the fall of the bias per key, ``(heads,)`` float64, zero without ALiBi."""
    from reference.alibi import slopes

    rates: Float = slopes(config.n_heads, config.alibi_bias_max).numpy()
    return rates if config.alibi else np.zeros_like(rates)


def probe_order(oracle: Oracle, order: Order, queries: int, keys: int, phase: float = 0.0) -> Float:
    """Return the bias of one evaluation order, ``(heads, query, key)``, as the probe measures it.

    Parameters
    ----------
    order
        Not a native one, which evaluates all heads or none.
    queries, keys
        Size of the table; queries are the last of the keys.
    phase
        As `probe_bias` has it.
    """
    from reference.model import attend

    # The probe's keys and values are the same for every head: one head holds them for all.
    config = replace(oracle.config, kv_n_heads=1)

    def only(heads: tuple[int, ...]) -> Attend:
        def run(q: Array, k: Array, v: Array) -> Array:
            tensors = tuple(oracle.view(array) for array in (q, k, v))
            context = attend(config, order, tensors[0], tensors[1], tensors[2], heads)
            return np.asarray(context.cpu().double().numpy())

        return run

    every = only(tuple(range(config.n_heads)))
    shape = AttentionShape.of(config, oracle.storage)
    return probe_bias(every, shape, expected_slopes(config), queries, keys, phase, only)
