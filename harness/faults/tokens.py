"""Faults at both ends: token ids, vocabulary, learned positions, logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend.nn import op

from harness.faults.model import Fault
from harness.faults.weights import changed

Mutation = Callable[[Any], Any]


def _ids(change: Callable[[Any, Any, Any, int], Any]) -> Mutation:
    """Return a mutation that looks up ``change(ids, b, s, rows)`` instead of ``ids[b, s]``."""

    def mutate(operations: Any) -> Any:
        def embed(ids: Any, table: Any) -> Any:
            def emit(ids: Any) -> Any:
                return te.compute(ids.shape, lambda b, s: change(ids, b, s, table.rows))

            return operations.embed(op.tensor_expr_op(emit, "ids", [ids]), table)

        return replace(operations, embed=embed)

    return mutate


def _positions(change: Callable[[Any, int], Any]) -> Mutation:
    """Return a mutation that takes position s from row ``change(s, rows)``."""

    def mutate(operations: Any) -> Any:
        def positions(ids: Any, table: Any) -> Any:
            def emit(ids: Any) -> Any:
                return te.compute(ids.shape, lambda b, s: change(s, table.rows).astype("int32"))

            return operations.embed(op.tensor_expr_op(emit, "rows", [ids]), table)

        return replace(operations, positions=positions)

    return mutate


def _mix(change: Callable[[Any, Any, Any, float], Any]) -> Mutation:
    """Return a mutation of the stream into block 0; ``change(mix, token, position, fraction)``."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations, mix=lambda token, position, f: change(operations.mix, token, position, f)
        )

    return mutate


def _logits(change: Callable[[Any, Any], Any]) -> Mutation:
    """Return a mutation of logits (b, s, vocab), as ``change(logits, at)`` in te."""

    def mutate(operations: Any) -> Any:
        def unembed(hidden: Any, table: Any, scale: float | None) -> Any:
            def emit(logits: Any) -> Any:
                return te.compute(logits.shape, lambda *at: change(logits, at))

            return op.tensor_expr_op(emit, "logits", [operations.unembed(hidden, table, scale)])

        return replace(operations, unembed=unembed)

    return mutate


def _scaled_embedding(operations: Any) -> Any:
    """Multiply token rows by the root of d_model."""

    def embed(ids: Any, table: Any) -> Any:
        return operations.embed(ids, table) * float(table.columns) ** 0.5

    return replace(operations, embed=embed)


def _capped(logits: Any, at: Any) -> Any:
    """Soft cap at 30, as other families have it."""
    return tirx.tanh(logits[at] / 30.0) * 30.0


def _beyond(logits: Any, at: Any) -> Any:
    """Give the rows beyond a tokenizer of 1024 ids no logits."""
    return tirx.Select(at[2] < 1024, logits[at], tirx.const(0.0, "float32"))


def _fault(
    name: str,
    first_tap: str,
    summary: str,
    operations: Mutation,
    evidence: str = "invented",
    exposure: str = "trained",
) -> Fault:
    return Fault(name, "tokens", evidence, exposure, first_tap, summary, operations=operations)


_WTE, _WPE = "transformer.wte", "transformer.wpe"

FAULTS: tuple[Fault, ...] = (
    _fault(
        "ids-off-by-one",
        _WTE,
        "every id looks up the next row",
        _ids(lambda ids, b, s, rows: tirx.floormod(ids[b, s] + 1, rows)),
    ),
    _fault(
        "ids-late-by-one",
        _WTE,
        "every position looks up the id before it",
        _ids(lambda ids, b, s, rows: ids[b, tirx.max(s - 1, 0)]),
    ),
    _fault(
        "ids-8-bit",
        _WTE,
        "ids are stored in 8 bits",
        _ids(lambda ids, b, s, rows: tirx.floormod(ids[b, s], 256)),
    ),
    _fault(
        "ids-last-rows-unknown",
        _WTE,
        "the last ids of the vocabulary are replaced by 0",
        _ids(lambda ids, b, s, rows: tirx.Select(ids[b, s] < rows - 1, ids[b, s], 0)),
        "https://github.com/ggml-org/llama.cpp/pull/3417",
    ),
    _fault(
        "ids-of-row-zero",
        _WTE,
        "every row of a batch reads the ids of row 0",
        _ids(lambda ids, b, s, rows: ids[0, s]),
    ),
    _fault(
        "embedding-times-root",
        _WTE,
        "token rows are multiplied by the root of d_model",
        _scaled_embedding,
    ),
    Fault(
        "vocabulary-rows-shifted",
        "tokens",
        "invented",
        "trained",
        _WTE,
        "the rows of the token table are shifted by one",
        weights=changed(lambda a, c: np.roll(a, 1, axis=0), "transformer.wte.weight"),
    ),
    Fault(
        "vocabulary-padding-lost",
        "tokens",
        "https://github.com/ggml-org/llama.cpp/pull/3417",
        "vocabulary-padding",
        _WTE,
        "rows beyond the tokenizer's 1024 ids are zero",
        weights=changed(
            lambda a, c: np.where(np.arange(len(a))[:, None] < 1024, a, 0), "transformer.wte.weight"
        ),
    ),
    _fault(
        "vocabulary-padding-without-logits",
        "logits",
        "rows beyond the tokenizer's 1024 ids get logit 0",
        _logits(_beyond),
        exposure="vocabulary-padding",
    ),
    _fault(
        "positions-from-one",
        _WPE,
        "learned positions start at row 1",
        _positions(lambda s, rows: tirx.min(s + 1, rows - 1)),
        exposure="wpe",
    ),
    _fault(
        "positions-from-end",
        _WPE,
        "learned positions are read from the last row",
        _positions(lambda s, rows: rows - 1 - s),
        exposure="wpe",
    ),
    _fault(
        "positions-all-zero",
        _WPE,
        "every position reads row 0, as one step of decoding would",
        _positions(lambda s, rows: s * 0),
        exposure="wpe",
    ),
    _fault(
        "positions-not-added",
        "logits",
        "position rows are looked up and not added",
        _mix(lambda mix, token, position, f: mix(token, None, f)),
        "transformers 5.23, models/mpt: no wpe exists",
        "wpe",
    ),
    _fault(
        "positions-added-twice",
        "logits",
        "position rows are added twice",
        _mix(lambda mix, token, position, f: mix(mix(token, position, 1.0), position, f)),
        exposure="wpe",
    ),
    _fault(
        "embedding-fraction-applied",
        "logits",
        "the stream is multiplied by embedding_fraction",
        _mix(lambda mix, token, position, f: mix(token, position, 1.0) * f),
        exposure="embedding-fraction",
    ),
    _fault(
        "logits-late-by-one",
        "logits",
        "logits are those of the position before",
        _logits(lambda logits, at: logits[at[0], tirx.max(at[1] - 1, 0), at[2]]),
    ),
    _fault("logits-capped", "logits", "logits are capped softly at 30", _logits(_capped)),
    _fault(
        "logits-centred",
        "logits",
        "logits are taken relative to that of id 0",
        _logits(lambda logits, at: logits[at] - logits[at[0], at[1], 0]),
    ),
)
