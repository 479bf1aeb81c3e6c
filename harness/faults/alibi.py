"""Faults of the ALiBi bias: slopes, sign, reference point, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from harness.faults.model import Fault

_PORT = "https://github.com/mlc-ai/mlc-llm/pull/460"


def _slopes(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a mutation that replaces the slopes by ``change(config)``."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations,
            slopes=lambda config: np.asarray(change(config), np.float32) * float(config.alibi),
        )

    return mutate


def _bias(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def mutate(operations: Any) -> Any:
        return replace(operations, attention=replace(operations.attention, bias=change))

    return mutate


def _exponents(config: Any) -> Any:
    power = 1 << (config.n_heads - 1).bit_length()
    return np.arange(1, power + 1) * config.alibi_bias_max / power


def _interleaved(slopes: Any, n_heads: int) -> Any:
    if slopes.size == n_heads:
        return slopes
    return np.concatenate([slopes[1::2], slopes[0::2]])[:n_heads]


FAULTS: tuple[Fault, ...] = (
    Fault(
        "alibi-inverse-square",
        "alibi",
        _PORT,
        "trained",
        "attn.context",
        "slopes are 1/m^2 instead of 2^-m",
        operations=_slopes(lambda c: _interleaved(1.0 / np.square(_exponents(c)), c.n_heads)),
    ),
    Fault(
        "alibi-absent",
        "alibi",
        "https://github.com/mosaicml/llm-foundry/issues/122",
        "trained",
        "attn.context",
        "the bias is never added",
        operations=_slopes(lambda c: np.zeros(c.n_heads)),
    ),
    Fault(
        "alibi-sign",
        "alibi",
        "invented",
        "trained",
        "attn.context",
        "the bias rewards distance",
        operations=_bias(lambda slope, distance: -(slope * distance)),
    ),
    Fault(
        "alibi-exponent-off-by-one",
        "alibi",
        "https://github.com/paiml/aprender/issues/2143",
        "trained",
        "attn.context",
        "exponents start at 0, so that head 0 has slope 1",
        operations=_slopes(
            lambda c: _interleaved(
                np.exp2(-(_exponents(c) - c.alibi_bias_max / _exponents(c).size)), c.n_heads
            )
        ),
    ),
    Fault(
        "alibi-no-interleave",
        "alibi",
        "invented",
        "trained",
        "attn.context",
        "heads that are no power of two take the first slopes in order",
        operations=_slopes(lambda c: np.exp2(-_exponents(c))[: c.n_heads]),
    ),
    Fault(
        "alibi-plain-heads",
        "alibi",
        "https://github.com/ml-explore/mlx/issues/343",
        "trained",
        "attn.context",
        "slopes are 2^(-max*i/H) although H is no power of two",
        operations=_slopes(
            lambda c: np.exp2(-np.arange(1, c.n_heads + 1) * c.alibi_bias_max / c.n_heads)
        ),
    ),
)
