"""Faults of mask, positions inside the attention, and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import op

from harness.faults.model import Fault

Mutation = Callable[[Any], Any]


def _visible(change: Callable[[Any, Any], Any] | None) -> Mutation:
    """Return a mutation that shows query a key where ``change(query, key)`` holds."""

    def mutate(operations: Any) -> Any:
        return replace(operations, attention=replace(operations.attention, visible=change))

    return mutate


def filled(value: float, like: Any) -> Any:
    """Return a float32 constant in as many lanes as ``like`` has; kernels take 16 keys at once."""
    lanes, scalar = like.ty.dtype.lanes, tirx.const(value, "float32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _given(change: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> Mutation:
    """Return a mutation that passes q, k, v through ``change`` before the attention."""

    def mutate(operations: Any) -> Any:
        attention = operations.attention
        return replace(
            operations,
            attention=lambda q, k, v, slopes, config: attention(*change(q, k, v), slopes, config),
        )

    return mutate


def _moved(x: Any, origin: Callable[[Any, Any], Any]) -> Any:
    """Return x (b, s, H, D) with position i taken from ``origin(i, s)``."""

    def emit(x: Any) -> Any:
        return te.compute(x.shape, lambda b, s, h, d: x[b, origin(s, x.shape[1]), h, d])

    return op.tensor_expr_op(emit, "moved", [x])


def _across_rows(x: Any) -> Any:
    """Return x with the content of batch row 0 in every row."""

    def emit(x: Any) -> Any:
        return te.compute(x.shape, lambda b, s, h, d: x[0, s, h, d])

    return op.tensor_expr_op(emit, "first_row", [x])


def _merged_by_channel(operations: Any) -> Any:
    """Merge heads as 'b s (d h)' instead of 'b s (h d)'."""

    def merge(x: Any) -> Any:
        b, s, h, d = x.shape
        return op.reshape(op.permute_dims(x, [0, 1, 3, 2]), (b, s, h * d))

    return replace(operations, merge_heads=merge)


def _split_by_channel(operations: Any) -> Any:
    """Split features as '(d h)' instead of '(h d)'."""

    def split(x: Any, heads: int) -> Any:
        b, s, features = x.shape
        return op.permute_dims(op.reshape(x, (b, s, features // heads, heads)), [0, 1, 3, 2])

    return replace(operations, split_heads=split)


def _without_transpose(operations: Any) -> Any:
    """Reshape (b, h, s, d) to (b, s, h d) without the transposition between."""

    def merge(x: Any) -> Any:
        b, s, h, d = x.shape
        return op.reshape(op.permute_dims(x, [0, 2, 1, 3]), (b, s, h * d))

    return replace(operations, merge_heads=merge)


def _soft_mask(value: float) -> Mutation:
    """Return a mutation that gives hidden keys ``value`` on top of their score."""

    def mutate(operations: Any) -> Any:
        attention = operations.attention

        def bias(slope: Any, distance: Any) -> Any:
            hidden = tirx.Select(distance > 0.0, filled(value, distance), filled(0.0, distance))
            return attention.bias(slope, distance) + hidden

        return replace(operations, attention=replace(attention, bias=bias, visible=None))

    return mutate


def _fault(
    name: str,
    summary: str,
    operations: Mutation,
    evidence: str = "invented",
    tap: str = "attn.context",
    exposure: str = "trained",
) -> Fault:
    return Fault(name, "mask", evidence, exposure, tap, summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault("mask-absent", "every query sees every key", _visible(None)),
    _fault(
        "mask-own-key-hidden",
        "a query does not see its own key",
        _visible(lambda query, key: key < query),
        tap="alibi",
    ),
    _fault(
        "mask-next-key-seen",
        "a query sees the key after its own",
        _visible(lambda query, key: key <= query + 1),
    ),
    _fault(
        "mask-inverted",
        "a query sees later keys only",
        _visible(lambda query, key: key > query),
        "https://github.com/apache/tvm/issues/15477",
        tap="alibi",
    ),
    _fault(
        "mask-future-included-own",
        "the mask is transposed: a query sees its own and later keys",
        _visible(lambda query, key: key >= query),
        tap="alibi",
    ),
    _fault(
        "mask-window-64",
        "only the last 64 keys are seen",
        _visible(lambda query, key: tirx.all(key <= query, key > query - 64)),
        tap="alibi",
    ),
    _fault(
        "mask-window-500",
        "only the last 500 keys are seen",
        _visible(lambda query, key: tirx.all(key <= query, key > query - 500)),
        tap="alibi",
        exposure="long-12-heads",
    ),
    _fault(
        "mask-first-key-hidden",
        "the first key is hidden, as by a padding mask that is off by one",
        _visible(lambda query, key: tirx.all(key <= query, tirx.any(key > 0, query == 0))),
        tap="alibi",
    ),
    _fault(
        "mask-blocks-of-32",
        "queries see only keys of their own tile of 32",
        _visible(
            lambda query, key: tirx.all(
                key <= query, tirx.floordiv(key, 32) == tirx.floordiv(query, 32)
            )
        ),
        tap="alibi",
    ),
    _fault(
        "mask-tile-edge-lost",
        "the last key of every tile of 64 is skipped by later queries",
        _visible(
            lambda query, key: tirx.all(
                key <= query, tirx.any(tirx.floormod(key, 64) != 63, key == query)
            )
        ),
        tap="alibi",
    ),
    _fault(
        "mask-prefix-of-4",
        "the first four keys are seen by every query",
        _visible(lambda query, key: tirx.any(key <= query, key < 4)),
    ),
    _fault(
        "mask-minus-ten",
        "hidden keys get -10 instead of being hidden",
        _soft_mask(-10.0),
    ),
    _fault(
        "keys-late-by-one",
        "keys are read from one position earlier",
        _given(lambda q, k, v: (q, _moved(k, lambda i, s: tirx.max(i - 1, 0)), v)),
        tap="alibi",
    ),
    _fault(
        "values-late-by-one",
        "values are read from one position earlier",
        _given(lambda q, k, v: (q, k, _moved(v, lambda i, s: tirx.max(i - 1, 0)))),
        tap="alibi",
    ),
    _fault(
        "last-key-stale",
        "the last key is that of the position before",
        _given(lambda q, k, v: (q, _moved(k, lambda i, s: tirx.min(i, s - 2)), v)),
        tap="alibi",
    ),
    _fault(
        "values-for-keys",
        "keys stand in for values",
        _given(lambda q, k, v: (q, k, k)),
        tap="alibi",
    ),
    _fault(
        "batch-row-zero-keys",
        "every row of a batch attends to the keys of row 0",
        _given(lambda q, k, v: (q, _across_rows(k), v)),
        "https://github.com/vllm-project/vllm/pull/832",
        tap="alibi",
    ),
    _fault(
        "batch-row-zero-values",
        "every row of a batch reads the values of row 0",
        _given(lambda q, k, v: (q, k, _across_rows(v))),
        tap="alibi",
    ),
    _fault("heads-merged-by-channel", "heads are merged as (d h)", _merged_by_channel),
    _fault("heads-split-by-channel", "q, k and v are split into heads as (d h)", _split_by_channel),
    _fault(
        "heads-merged-untransposed",
        "heads are merged without moving them next to the channels",
        _without_transpose,
        "https://github.com/mlc-ai/mlc-llm/pull/460",
    ),
)
