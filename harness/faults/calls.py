"""Faults around the compiled functions: what a deployment does with ids, rows and a cache.

Nothing that is compiled differs; the plain forward is right, except where rows have lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from harness.faults.model import Fault

Method = Callable[..., Any]


def _around(method: str, change: Callable[[Method], Method]) -> Callable[[Any], None]:
    """Return a mutation that puts ``change(method)`` in the place of a method."""

    def mutate(port: Any) -> None:
        setattr(port, method, change(getattr(port, method)))

    return mutate


def _known(ids: Any, rows: int) -> Any:
    """Replace ids of the last 64 rows, or of half of them, by 0."""
    return np.where(ids < max(rows - 64, rows // 2), ids, 0).astype(np.int32)


def _known_decode(port: Any) -> None:
    plain = port.decode
    port.decode = lambda state, ids: plain(state, _known(ids, port._model.config.vocab_size))


def _shared(fork: Method) -> Method:
    def shallow(state: Any) -> Any:
        # Lengths are their own, keys and values are not.
        return copy.copy(state)

    return shallow


def _kept(truncate: Method) -> Method:
    return lambda state, lengths: state


def _short(truncate: Method) -> Method:
    def one_short(state: Any, lengths: Any) -> Any:
        return truncate(state, np.minimum(np.asarray(lengths) + 1, state.lengths))

    return one_short


def _row_0(truncate: Method) -> Method:
    def of_row_0(state: Any, lengths: Any) -> Any:
        first = np.full_like(np.asarray(lengths), lengths[0])
        return truncate(state, np.minimum(first, state.lengths))

    return of_row_0


def _aligned(forward: Method) -> Method:
    def aligned(ids: Any, lengths: Any = None) -> Any:
        logits = forward(ids)
        if lengths is None:
            return logits
        shifts = np.asarray(ids).shape[1] - np.asarray(lengths)
        return np.stack([np.roll(row, int(n), 0) for row, n in zip(logits, shifts, strict=True)])

    return aligned


def _fault(
    name: str,
    summary: str,
    first: str,
    calls: Callable[[Any], None],
    evidence: str = "invented",
) -> Fault:
    return Fault(name, "decode", evidence, "trained", f"paths.{first}", summary, calls=calls)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "fork-shares-cache",
        "a fork copies lengths, and shares keys and values",
        "fork",
        _around("fork", _shared),
    ),
    _fault(
        "roll-back-forgets-nothing",
        "a roll-back leaves the cache as it is",
        "roll-back",
        _around("truncate", _kept),
    ),
    _fault(
        "roll-back-one-short",
        "a roll-back leaves one token too many",
        "roll-back",
        _around("truncate", _short),
    ),
    _fault(
        "roll-back-of-row-0",
        "all sequences are rolled back to the length of the first",
        "roll-back",
        _around("truncate", _row_0),
    ),
    _fault(
        "lengths-align-right",
        "logits of shorter rows are moved to the end",
        "lengths",
        _around("forward", _aligned),
    ),
    _fault(
        "decode-last-rows-unknown",
        "a decode step replaces ids of the last rows, padding of the vocabulary, by 0",
        "decode",
        _known_decode,
        "https://github.com/ggml-org/llama.cpp/pull/3417",
    ),
)
