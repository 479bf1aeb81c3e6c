"""Faults of a deployment's paths: a cache, a past, chunks and ragged batches.

The plain forward is right in every one of them; only what runs over a cache is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import op

from harness.faults.model import Fault

Mutation = Callable[[Any], Any]


def _cached(**pieces: Any) -> Mutation:
    """Return a mutation that replaces pieces of the attention with a past."""

    def mutate(operations: Any) -> Any:
        return replace(operations, cached=replace(operations.cached, **pieces))

    return mutate


def _when(condition: Any, then: Any, otherwise: Any) -> Any:
    return tirx.Select(condition, then, otherwise)


def _spread(value: Any, like: Any) -> Any:
    """Return a scalar in as many lanes as ``like`` has."""
    lanes = like.ty.dtype.lanes
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _times(factor: Callable[[Any], Any]) -> Any:
    """Return a bias that is multiplied by ``factor(number of new tokens)``."""

    def bias(slope: Any, distance: Any, count: Any) -> Any:
        return slope * distance * _spread(factor(count), distance)

    return bias


def _constant(value: float) -> Any:
    return tirx.const(value, "float32")


def _clipped(least: Callable[[Any], Any]) -> Any:
    """Return a bias of distances that are no further back than ``least(number of new tokens)``."""

    def bias(slope: Any, distance: Any, count: Any) -> Any:
        return slope * tirx.max(distance, _spread(least(count), distance))

    return bias


def _decoding(count: Any) -> Any:
    return count == 1


def _later(past: Any) -> Any:
    return past > 0


def _before(index: Any) -> Any:
    return tirx.max(index - 1, tirx.const(0, index.ty.dtype))


def _restarting(ids: Any, table: Any, lengths: Any, starts: Any) -> Any:
    """Position rows that begin again with every call."""
    layout, columns = table.layout, table.columns

    def gather(ids: Any, weight: Any) -> Any:
        return te.compute(
            (*ids.shape, columns), lambda b, s, k: layout.element(weight, s, k), name="restarting"
        )

    return op.tensor_expr_op(gather, "restarting", [ids, table.weight])


def _counting_padding(ids: Any, table: Any, lengths: Any, starts: Any) -> Any:
    """Position rows that count padding on the left."""
    layout, columns, last = table.layout, table.columns, table.rows - 1

    def gather(ids: Any, weight: Any, lengths: Any) -> Any:
        def element(b: Any, s: Any, k: Any) -> Any:
            place = tirx.min(lengths[b].astype("int64") + s, tirx.const(last, "int64"))
            return layout.element(weight, place, k)

        return te.compute((*ids.shape, columns), element, name="counting_padding")

    return op.tensor_expr_op(gather, "counting_padding", [ids, table.weight, lengths])


def _fault(
    name: str,
    summary: str,
    first: str,
    operations: Mutation,
    evidence: str = "invented",
    exposure: str = "trained",
) -> Fault:
    return Fault(
        name, "decode", evidence, exposure, f"paths.{first}", summary, operations=operations
    )


def _equivalent(
    name: str, summary: str, operations: Mutation, proof: str, evidence: str = "invented"
) -> Fault:
    return Fault(
        name,
        "decode",
        evidence,
        "trained",
        "none",
        summary,
        operations=operations,
        equivalent=True,
        proof=proof,
    )


BIAS = (
    _fault(
        "decode-bias-absent",
        "the decode step has no bias",
        "decode",
        _cached(bias=_times(lambda n: _when(_decoding(n), _constant(0.0), _constant(1.0)))),
        "https://github.com/HabanaAI/vllm-fork/pull/437",
    ),
    _fault(
        "cached-bias-absent",
        "no call over a cache has a bias",
        "prefill",
        _cached(bias=_times(lambda n: _constant(0.0))),
    ),
    _fault(
        "decode-bias-sign",
        "the bias of a decode step grows with the distance",
        "decode",
        _cached(bias=_times(lambda n: _when(_decoding(n), _constant(-1.0), _constant(1.0)))),
    ),
    _fault(
        "decode-bias-twice",
        "the bias of a decode step is added twice",
        "decode",
        _cached(bias=_times(lambda n: _when(_decoding(n), _constant(2.0), _constant(1.0)))),
    ),
    _fault(
        "bias-over-query-length",
        "the bias is as wide as the new tokens are many: the past shares its last value",
        "decode",
        _cached(bias=_clipped(lambda n: (1 - n).astype("float32"))),
        "https://github.com/keras-team/keras-hub/pull/2977",
    ),
    _fault(
        "decode-bias-of-8",
        "the bias of a decode step ends 8 keys back",
        "decode",
        _cached(
            bias=_clipped(lambda n: _when(_decoding(n), _constant(-8.0), _constant(-(2.0**30))))
        ),
    ),
    _fault(
        "decode-slope-of-head-before",
        "a decode step uses the slope of the head before",
        "decode",
        _cached(head=lambda h, n, c: _when(_decoding(n), _before(h), h)),
    ),
    _fault(
        "slope-of-local-head",
        "every half of the heads counts from 0, as under tensor parallelism of two",
        "prefill",
        _cached(head=lambda h, n, c: tirx.floormod(h, max(1, c.n_heads // 2))),
    ),
    _fault(
        "decode-slope-of-local-head",
        "the same in a decode step only",
        "decode",
        _cached(
            head=lambda h, n, c: _when(_decoding(n), tirx.floormod(h, max(1, c.n_heads // 2)), h)
        ),
    ),
)

MASK = (
    _fault(
        "chunk-mask-ignores-past",
        "a chunk's mask begins at slot 0, whatever was there before",
        "decode",
        _cached(edge=lambda past, i, n: i),
    ),
    _fault(
        "decode-sees-first-slot-only",
        "the mask of a decode step ignores the past",
        "decode",
        _cached(edge=lambda past, i, n: _when(_decoding(n), i, past + i)),
    ),
    _fault(
        "chunk-sees-all-of-itself",
        "tokens of a later chunk see each other's future",
        "extend",
        _cached(edge=lambda past, i, n: _when(_later(past), past + n - 1, past + i)),
    ),
    _fault(
        "length-without-the-new-token",
        "the length handed to a decode step is that of the past: it does not see itself",
        "decode",
        _cached(edge=lambda past, i, n: _when(_later(past), past + i - 1, past + i)),
    ),
    _fault(
        "chunk-sees-next",
        "a token of a later chunk sees the one after it",
        "extend",
        _cached(edge=lambda past, i, n: _when(_later(past), past + i + 1, past + i)),
    ),
    _fault(
        "cache-window-of-8",
        "only the last 8 slots of the past are seen",
        "decode",
        _cached(start=lambda start, past, n: tirx.max(start, past - 8)),
    ),
    _fault(
        "first-slot-hidden",
        "the first slot of a past is hidden, as by a padding mask that is off by one",
        "decode",
        _cached(start=lambda start, past, n: _when(_later(past), start + 1, start)),
    ),
    _fault(
        "padding-seen",
        "padding on the left is seen",
        "left-padding",
        _cached(start=lambda start, past, n: start - start),
    ),
    _fault(
        "padding-seen-in-decode",
        "padding on the left is seen by decode steps",
        "left-padding",
        _cached(start=lambda start, past, n: _when(_decoding(n), start - start, start)),
    ),
    _fault(
        "padding-mask-one-short",
        "the last slot of padding on the left is seen",
        "left-padding",
        _cached(start=lambda start, past, n: _before(start)),
    ),
)

SLOTS = (
    _fault(
        "decode-key-one-slot-early",
        "a decode step stores its key over that of the token before; its own slot is stale",
        "decode",
        _cached(key_slot=lambda past, i, n: _when(_decoding(n), _before(past), past + i)),
    ),
    _fault(
        "decode-value-one-slot-early",
        "a decode step stores its value over that of the token before",
        "decode",
        _cached(value_slot=lambda past, i, n: _when(_decoding(n), _before(past), past + i)),
    ),
    _fault(
        "chunk-keys-from-slot-0",
        "keys of a chunk are stored from slot 0 on",
        "decode",
        _cached(key_slot=lambda past, i, n: i),
    ),
    _fault(
        "chunk-values-from-slot-0",
        "values of a chunk are stored from slot 0 on",
        "decode",
        _cached(value_slot=lambda past, i, n: i),
    ),
    _fault(
        "chunk-keys-reversed",
        "keys of a later chunk are stored in reverse",
        "extend",
        _cached(key_slot=lambda past, i, n: _when(_later(past), past + n - 1 - i, past + i)),
    ),
    _fault(
        "last-key-of-chunk-lost",
        "the last key of a later chunk is stored over the one before it",
        "extend",
        _cached(
            key_slot=lambda past, i, n: _when(
                tirx.all(_later(past), i == n - 1, n > 1), past + i - 1, past + i
            )
        ),
    ),
    _fault(
        "values-one-slot-early",
        "values of a later chunk are stored one slot early",
        "decode",
        _cached(value_slot=lambda past, i, n: _when(_later(past), past + i - 1, past + i)),
    ),
)

ROWS = (
    _fault(
        "decode-reads-row-0",
        "every sequence of a decode step reads the cache of sequence 0",
        "decode",
        _cached(read=lambda row, n: _when(_decoding(n), row - row, row)),
        "https://github.com/vllm-project/vllm/pull/832",
    ),
    _fault(
        "decode-reads-row-before",
        "a sequence of a decode step reads the cache of the one before it",
        "decode",
        _cached(read=lambda row, n: _when(_decoding(n), _before(row), row)),
    ),
    _fault(
        "decode-writes-row-0",
        "every sequence of a decode step writes into the cache of sequence 0",
        "decode",
        _cached(written=lambda row, n: _when(_decoding(n), row - row, row)),
    ),
    _fault(
        "caches-aliased",
        "all sequences share the cache of sequence 0",
        "prefill",
        _cached(written=lambda row, n: row - row, read=lambda row, n: row - row),
    ),
    _fault(
        "chunk-reads-row-0",
        "every sequence of a chunk reads the cache of sequence 0",
        "prefill",
        _cached(read=lambda row, n: _when(_decoding(n), row, row - row)),
    ),
    _fault(
        "decode-key-head-before",
        "a decode step reads the key head before",
        "decode",
        _cached(key_head=lambda h, n: _when(_decoding(n), _before(h), h)),
    ),
    _fault(
        "decode-key-head-0",
        "a decode step reads key head 0 for all heads, as in multi-query attention",
        "decode",
        _cached(key_head=lambda h, n: _when(_decoding(n), h - h, h)),
    ),
)

POSITIONS = (
    _fault(
        "positions-restart",
        "learned positions begin at 0 in every call",
        "decode",
        lambda operations: replace(operations, positions_after=_restarting),
        exposure="wpe",
    ),
    _fault(
        "positions-count-padding",
        "learned positions count padding on the left",
        "left-padding",
        lambda operations: replace(operations, positions_after=_counting_padding),
        "https://github.com/huggingface/transformers/issues/3021",
        exposure="wpe",
    ),
)

EQUIVALENT = (
    _equivalent(
        "same-decode-position-one-short",
        "a decode step measures distances from the token before",
        _cached(position=lambda past, i, n: _when(_decoding(n), past + i - 1, past + i)),
        "every key of a row gets the same slope more: softmax does not see it",
        "https://github.com/vllm-project/vllm/pull/945",
    ),
    _equivalent(
        "same-position-of-chunk",
        "distances are measured from the place within the chunk",
        _cached(position=lambda past, i, n: i),
        "every key of a row gets the same multiple of the slope more: softmax does not see it",
    ),
    _equivalent(
        "same-bias-from-slot-0",
        "the bias is slope times slot, without the query",
        _cached(position=lambda past, i, n: past - past),
        "the query's share is the same for every key of a row: softmax does not see it",
    ),
)

FAULTS: tuple[Fault, ...] = (*BIAS, *MASK, *SLOTS, *ROWS, *POSITIONS, *EQUIVALENT)
