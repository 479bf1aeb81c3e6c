"""Faults of the ALiBi bias: slopes, sign, reference point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx

from harness.faults.model import Fault

_PORT = "https://github.com/mlc-ai/mlc-llm/pull/460"

Mutation = Callable[[Any], Any]


def _slopes(change: Callable[[Any], Any]) -> Mutation:
    """Return a mutation that replaces the slopes by ``change(config)``."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations,
            slopes=lambda config: np.asarray(change(config), np.float32) * float(config.alibi),
        )

    return mutate


def _from_slopes(change: Callable[[Any], Any]) -> Mutation:
    """Return a mutation that passes the right slopes through ``change``."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations,
            slopes=lambda config: np.ascontiguousarray(
                change(operations.slopes(config)), dtype=np.float32
            ),
        )

    return mutate


def _bias(change: Callable[[Any, Any], Any]) -> Mutation:
    """Return a mutation that computes the bias as ``change(slope, distance)``."""

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


def _even_first(config: Any) -> Any:
    """Take every second slope from the first instead of from the second."""
    slopes = np.exp2(-_exponents(config))
    if slopes.size == config.n_heads:
        return slopes
    return np.concatenate([slopes[0::2], slopes[1::2]])[: config.n_heads]


def _by_key_head(config: Any) -> Any:
    """Give all query heads of a key head the slope that it would have as a query head."""
    power = 1 << (config.kv_n_heads - 1).bit_length()
    slopes = np.exp2(-np.arange(1, power + 1) * config.alibi_bias_max / power)
    return np.repeat(_interleaved(slopes, config.kv_n_heads), config.n_heads // config.kv_n_heads)


def _fault(
    name: str,
    summary: str,
    operations: Mutation,
    evidence: str = "invented",
    exposure: str = "trained",
) -> Fault:
    return Fault(name, "alibi", evidence, exposure, "alibi", summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "alibi-inverse-square",
        "slopes are 1/m^2 instead of 2^-m",
        _slopes(lambda c: _interleaved(1.0 / np.square(_exponents(c)), c.n_heads)),
        _PORT,
    ),
    _fault(
        "alibi-absent",
        "the bias is never added",
        _slopes(lambda c: np.zeros(c.n_heads)),
        "https://github.com/mosaicml/llm-foundry/issues/122",
    ),
    _fault(
        "alibi-sign",
        "the bias rewards distance",
        _bias(lambda slope, distance: -(slope * distance)),
        "https://github.com/explosion/curated-transformers/pull/260",
    ),
    _fault(
        "alibi-exponent-off-by-one",
        "exponents start at 0, so that head 0 has slope 1",
        _slopes(
            lambda c: _interleaved(
                np.exp2(-(_exponents(c) - c.alibi_bias_max / _exponents(c).size)), c.n_heads
            )
        ),
        "https://github.com/paiml/aprender/issues/2143",
    ),
    _fault(
        "alibi-no-interleave",
        "heads that are no power of two take the first slopes in order",
        _slopes(lambda c: np.exp2(-_exponents(c))[: c.n_heads]),
    ),
    _fault(
        "alibi-even-slopes-first",
        "the interleaving starts with the first slope instead of the second",
        _slopes(_even_first),
    ),
    _fault(
        "alibi-plain-heads",
        "slopes are 2^(-max*i/H) although H is no power of two",
        _slopes(lambda c: np.exp2(-np.arange(1, c.n_heads + 1) * c.alibi_bias_max / c.n_heads)),
        "https://github.com/ml-explore/mlx/issues/343",
    ),
    _fault(
        "alibi-power-below",
        "slopes are made for the power of two below the number of heads, and repeated",
        _slopes(
            lambda c: np.resize(
                np.exp2(
                    -np.arange(1, 2 ** (c.n_heads.bit_length() - 1) + 1)
                    * c.alibi_bias_max
                    / 2 ** (c.n_heads.bit_length() - 1)
                ),
                c.n_heads,
            )
        ),
        "https://github.com/NVIDIA/TensorRT-LLM/issues/1611",
    ),
    _fault(
        "alibi-natural-base",
        "slopes are e^-m instead of 2^-m",
        _slopes(lambda c: _interleaved(np.exp(-_exponents(c)), c.n_heads)),
    ),
    _fault(
        "alibi-linear-slopes",
        "slopes fall linearly over the heads",
        _slopes(lambda c: 1.0 - np.arange(1, c.n_heads + 1) / (c.n_heads + 1)),
    ),
    _fault(
        "alibi-bias-max-16",
        "alibi_bias_max is taken to be 16",
        _slopes(lambda c: _interleaved(np.exp2(-2 * _exponents(c)), c.n_heads)),
    ),
    _fault("alibi-heads-reversed", "heads get the slopes from the last", _from_slopes(np.flip)),
    _fault(
        "alibi-heads-rolled",
        "every head gets the slope of the next",
        _from_slopes(lambda s: np.roll(s, 1)),
    ),
    _fault(
        "alibi-shard-zero-slopes",
        "the second tensor-parallel rank uses the slopes of the first",
        _from_slopes(lambda s: np.resize(s[: len(s) // 2], len(s))),
        "https://github.com/microsoft/Megatron-DeepSpeed/pull/227",
    ),
    _fault(
        "alibi-one-slope",
        "every head uses the slope of head 0",
        _from_slopes(lambda s: np.full_like(s, s[0])),
    ),
    _fault(
        "alibi-last-head-none",
        "the last head gets no bias",
        _from_slopes(lambda s: np.append(s[:-1], 0.0)),
    ),
    _fault(
        "alibi-slopes-by-key-head",
        "slopes are made for the key heads, and shared by the queries of each",
        _slopes(_by_key_head),
        exposure="grouped-query",
    ),
    _fault("alibi-twice", "the bias is added twice", _bias(lambda s, d: 2.0 * (s * d))),
    _fault(
        "alibi-1-percent", "the bias is one percent too large", _bias(lambda s, d: 1.01 * s * d)
    ),
    _fault("alibi-squared", "the bias grows with the square", _bias(lambda s, d: -(s * d * d))),
    _fault(
        "alibi-capped",
        "the distance is capped at 128, as a bucketed table would do",
        _bias(lambda s, d: s * tirx.max(d, tirx.const(-128.0, "float32"))),
    ),
    _fault(
        "alibi-own-key-exempt",
        "distances start at the key before the query, so that the first two keys are equal",
        _bias(lambda s, d: s * tirx.min(d + 1.0, tirx.const(0.0, "float32"))),
    ),
    _fault(
        "alibi-before-scale",
        "the bias is added before q.k is scaled, so that it is scaled too",
        lambda ops: replace(
            ops,
            slopes=lambda config: (ops.slopes(config) * config.scale).astype(np.float32),
        ),
    ),
)
