"""Every path of a deployment against the plain forward: the same tokens must give the same logits.

Each check is a relation between two ways of the same subject: in one piece, in two, token by token,
in a batch in another order, alone, padded, forked, rolled back. Neither side is the golden; it only
tells how far two correct evaluations may lie apart, as where the deployed forward is held against
the chain of taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.measure.compare import Proof, measure_difference
from harness.measure.oracle import Oracle, flat
from harness.measure.records import Event, Failure, Skip
from harness.measure.run import Case
from harness.measure.taps import Place
from harness.subjects.calls import SubjectFailure, call_array, call_plain, call_state
from harness.subjects.protocol import Array, path_capabilities

LENGTH = 24
"""Tokens of each row: a few more than what one vector or one panel of a kernel holds."""
ROWS = 3
_FAR = 512
"""Most padding of the translation check; a smaller ``max_seq_len`` is passed by it."""


@dataclass(frozen=True)
class Piece:
    """Logits that one path gave for some positions of one row, ``(positions, vocab)``."""

    row: int
    first: int
    logits: Array


def gather(table: Array, pieces: Sequence[Piece]) -> Array:
    """Return the rows of ``(batch, seq, columns)`` that the pieces are about, one after another."""
    return np.concatenate([table[p.row, p.first : p.first + len(p.logits)] for p in pieces])


class Driver:
    """Calls the paths of a subject with every shape checked, on fixed rows of ids."""

    def __init__(self, subject: Any, ids: Array, vocab_size: int, max_seq_len: int) -> None:
        self.subject, self.ids = subject, ids
        self.rows, self.length = ids.shape
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        # Other tokens than the right ones, for what is to be forgotten again.
        self.wrong = np.ascontiguousarray((ids[:, ::-1] + 1) % vocab_size).astype(np.int32)

    def forward(self, ids: Array, *more: Array) -> Array:
        """Return the logits of the plain forward."""
        return call_array("forward", self.subject.forward, (ids, *more), self._shape(ids))

    def prefill(
        self, ids: Array, lengths: Array | None = None, starts: Array | None = None
    ) -> tuple[Array, Any]:
        """Return logits and a new state."""
        given = (ids, lengths, starts)
        return call_state("prefill", self.subject.prefill, given, self._shape(ids))

    def extend(self, state: Any, ids: Array, lengths: Array | None = None) -> Array:
        """Add tokens to every row of a state."""
        arguments = (state, ids) if lengths is None else (state, ids, lengths)
        return call_array("extend", self.subject.extend, arguments, self._shape(ids))

    def decode(self, state: Any, ids: Array) -> Array:
        """Add one token to every row of a state."""
        shape = (len(ids), self.vocab_size)
        return call_array("decode", self.subject.decode, (state, ids), shape)

    def fork(self, state: Any) -> Any:
        """Return a copy of a state."""
        return call_plain("fork", self.subject.fork, state)

    def truncate(self, state: Any, lengths: Array) -> Any:
        """Return a state rolled back."""
        return call_plain("truncate", self.subject.truncate, state, lengths)

    def _shape(self, ids: Array) -> tuple[int, ...]:
        return (*ids.shape, self.vocab_size)

    def onward(self, state: Any, rows: Sequence[int], starts: Sequence[int]) -> Iterator[Piece]:
        """Decode rows from where each stands until the furthest is at its end."""
        at = np.array(starts)
        while at.max() < self.length:
            tokens = np.array([self.ids[row, i] for row, i in zip(rows, at, strict=True)], np.int32)
            logits = self.decode(state, tokens)
            yield from (
                Piece(row, int(i), logits[n, None])
                for n, (row, i) in enumerate(zip(rows, at, strict=True))
            )
            at += 1


def _whole(logits: Array, rows: Sequence[int], first: int = 0) -> Iterator[Piece]:
    yield from (Piece(row, first, logits[n]) for n, row in enumerate(rows))


def _padded(driver: Driver, left: Sequence[int], ends: Sequence[int]) -> Array:
    """Return each row's first tokens behind padding, with its end at the place asked for."""
    width = max(left[n] + ends[n] for n in range(driver.rows))
    # Padding is filled with the row's last token: a harmless id would hide that it is seen.
    result = np.repeat(driver.ids[:, -1:], width, axis=1)
    for row in range(driver.rows):
        result[row, left[row] : left[row] + ends[row]] = driver.ids[row, : ends[row]]
    return result


def _prefill(driver: Driver) -> Iterator[Piece]:
    logits, _ = driver.prefill(driver.ids)
    yield from _whole(logits, range(driver.rows))


def _extend(driver: Driver) -> Iterator[Piece]:
    for split in range(1, driver.length):
        logits, state = driver.prefill(driver.ids[:, :split])
        yield from _whole(logits, range(driver.rows))
        rest = driver.extend(state, driver.ids[:, split:])
        yield from _whole(rest, range(driver.rows), split)


def _decode(driver: Driver) -> Iterator[Piece]:
    _, state = driver.prefill(driver.ids[:, :1])
    yield from driver.onward(state, range(driver.rows), [1] * driver.rows)


def _chunks(driver: Driver) -> Iterator[Piece]:
    """Chunks of every size, mixed with decode steps."""
    for size in (1, 2, 3, 7, driver.length):
        logits, state = driver.prefill(driver.ids[:, :size])
        yield from _whole(logits, range(driver.rows))
        for at in range(size, driver.length, size):
            piece = driver.extend(state, driver.ids[:, at : at + size])
            yield from _whole(piece, range(driver.rows), at)


def _order(driver: Driver) -> Iterator[Piece]:
    half = driver.length // 2
    turned = [*range(1, driver.rows), 0]
    for rows in (turned, list(reversed(range(driver.rows)))):
        logits, state = driver.prefill(driver.ids[rows, :half])
        yield from _whole(logits, rows)
        yield from driver.onward(state, rows, [half] * driver.rows)


def _width(driver: Driver) -> Iterator[Piece]:
    half = driver.length // 2
    for rows in (
        *([row] for row in range(driver.rows)),
        [0, 1],
        [n % driver.rows for n in range(7)],
    ):
        logits, state = driver.prefill(driver.ids[rows, :half])
        yield from _whole(logits, rows)
        rest = driver.extend(state, driver.ids[rows, half:-1])
        yield from _whole(rest, rows, half)
        yield from driver.onward(state, rows, [driver.length - 1] * len(rows))


def _ragged(driver: Driver) -> Iterator[Piece]:
    ends = [driver.length // 2 + 3 * row - 2 for row in range(driver.rows)]
    ends = [max(1, min(end, driver.length - 2)) for end in ends]
    padded = _padded(driver, [0] * driver.rows, ends)
    logits, state = driver.prefill(padded, np.array(ends, np.int32))
    yield from (Piece(row, 0, logits[row, : ends[row]]) for row in range(driver.rows))
    # A chunk of unequal lengths behind a past of unequal lengths.
    added = np.array([1 + row % 2 for row in range(driver.rows)], np.int32)
    chunk = np.stack(
        [driver.ids[row, [ends[row], ends[row] + added[row] - 1]] for row in range(driver.rows)]
    )
    rest = driver.extend(state, chunk, added)
    yield from (Piece(row, ends[row], rest[row, : added[row]]) for row in range(driver.rows))
    at = [end + int(more) for end, more in zip(ends, added, strict=True)]
    if max(at) < driver.length:
        yield from driver.onward(state, range(driver.rows), at)


def _left(driver: Driver, left: Sequence[int]) -> Iterator[Piece]:
    half = driver.length // 2
    # All end in the same column, as where prompts are aligned to the right.
    ends = [half + max(left) - pad if max(left) < half else half for pad in left]
    padded = _padded(driver, left, ends)
    stops = np.array([pad + end for pad, end in zip(left, ends, strict=True)], np.int32)
    logits, state = driver.prefill(padded, stops, np.array(left, np.int32))
    yield from (
        Piece(row, 0, logits[row, left[row] : left[row] + ends[row]]) for row in range(driver.rows)
    )
    yield from driver.onward(state, range(driver.rows), ends)


def _left_padding(driver: Driver) -> Iterator[Piece]:
    yield from _left(driver, [3 * row for row in range(driver.rows)])
    yield from _left(driver, [17] * driver.rows)


def _translation(driver: Driver) -> Iterator[Piece]:
    far = min(driver.max_seq_len, _FAR)
    yield from _left(driver, [far + 5 * row for row in range(driver.rows)])


def _vocabulary(driver: Driver) -> Iterator[Piece]:
    row, half = driver.rows - 1, driver.length // 2
    logits, state = driver.prefill(driver.ids[[row], :half])
    yield from _whole(logits, [row])
    yield from driver.onward(state, [row], [half])


def _fork(driver: Driver) -> Iterator[Piece]:
    half, rows = driver.length // 2, range(driver.rows)
    _, state = driver.prefill(driver.ids[:, :half])
    other, third = driver.fork(state), driver.fork(state)
    # Step by step: what two shared would be overwritten by the wrong one before it is read.
    for piece in driver.onward(state, rows, [half] * driver.rows):
        yield piece
        if piece.row == driver.rows - 1:
            driver.decode(other, driver.wrong[:, piece.first])
    yield from driver.onward(third, rows, [half] * driver.rows)


def _roll_back(driver: Driver) -> Iterator[Piece]:
    half, rows = driver.length // 2, range(driver.rows)
    _, state = driver.prefill(driver.ids[:, :half])
    # No further than the tokens go: learned positions may end there.
    driver.extend(state, driver.wrong[:, half:-1])
    driver.decode(state, driver.wrong[:, -1])
    back = [max(1, half - row) for row in rows]
    state = driver.truncate(state, np.array(back, np.int32))
    yield from driver.onward(state, rows, back)


def _lengths(driver: Driver) -> Iterator[Piece]:
    ends = [max(1, driver.length - 3 * row) for row in range(driver.rows)]
    padded = _padded(driver, [0] * driver.rows, ends)
    logits = driver.forward(padded, np.array(ends, np.int32))
    yield from (Piece(row, 0, logits[row, : ends[row]]) for row in range(driver.rows))


@dataclass(frozen=True)
class PathCheck:
    """One relation.

    Attributes
    ----------
    name
        As the report has it, after ``paths.``.
    needs
        Methods of the subject.
    meaning
        What is the same.
    run
        Gives the pieces that are compared with the forward of the same tokens.
    """

    name: str
    needs: tuple[str, ...]
    meaning: str
    run: Callable[[Driver], Iterator[Piece]]


CHECKS: tuple[PathCheck, ...] = (
    PathCheck("prefill", ("prefill",), "filling a cache is the plain forward", _prefill),
    PathCheck("decode", ("prefill", "decode"), "token by token", _decode),
    PathCheck("extend", ("prefill", "extend"), "two pieces, split anywhere", _extend),
    PathCheck("chunks", ("prefill", "extend"), "chunks of any size", _chunks),
    PathCheck("batch-order", ("prefill", "decode"), "rows in another order", _order),
    PathCheck("batch-width", ("prefill", "extend", "decode"), "alone or among others", _width),
    PathCheck("ragged", ("prefill", "extend", "decode"), "rows of unequal lengths", _ragged),
    PathCheck("left-padding", ("prefill", "decode"), "behind padding", _left_padding),
    PathCheck("translation", ("prefill", "decode"), "at any offset", _translation),
    PathCheck("vocabulary", ("prefill", "decode"), "tokens of the last rows", _vocabulary),
    PathCheck("fork", ("prefill", "extend", "decode", "fork"), "beside another future", _fork),
    PathCheck(
        "roll-back", ("prefill", "extend", "decode", "truncate"), "after a false future", _roll_back
    ),
    PathCheck("lengths", ("prefill",), "forward with rows of unequal lengths", _lengths),
)


SHORTEST = 4
"""Tokens below which a sequence cannot be split, extended and rolled back."""


def rows_of(cases: Sequence[Case], max_seq_len: int, vocab_size: int) -> Array:
    """Return ``(ROWS, LENGTH)`` ids: of the cases the row with most different tokens, and turned.

    The last row holds the last ids of the vocabulary, which often no tokenizer gives: padding of
    the embedding, whose rows are rows like all others.
    """
    every = [row for case in cases for row in case.ids]
    richest = max(every, key=lambda row: (len(np.unique(row[:LENGTH])), len(row)))
    length = min(LENGTH, max_seq_len)
    row = np.resize(richest, length)
    last = (vocab_size - 1 - np.arange(length)) % vocab_size
    return np.stack([row, row[::-1], last]).astype(np.int32)


def split_checks(
    offers: frozenset[str], config: Any
) -> tuple[tuple[PathCheck, ...], tuple[Skip, ...]]:
    """Return the checks that a subject and a config admit, and why the others do not apply.

    Parameters
    ----------
    offers
        The subject's `path_capabilities`.
    config
        With ``max_seq_len`` and ``alibi``.
    """
    chosen, left = [], []
    for check in CHECKS:
        lacking = [name for name in check.needs if name not in offers]
        if lacking:
            left.append(Skip("path", check.name, f"the subject has no {lacking[0]}()"))
        elif config.max_seq_len < SHORTEST:
            left.append(Skip("path", check.name, f"max_seq_len is below {SHORTEST}"))
        elif check.name == "translation" and not config.alibi:
            reason = "learned positions, if any, end at max_seq_len"
            left.append(Skip("path", check.name, reason))
        else:
            chosen.append(check)
    return tuple(chosen), tuple(left)


def path_events(
    oracle: Oracle,
    subject: Any,
    cases: Sequence[Case],
    progress: Callable[[str], None] = lambda text: None,
    proved: Proof | None = None,
) -> Iterator[Event]:
    """Yield a measurement, a failure or a skip for each of `CHECKS`.

    Parameters
    ----------
    oracle
        Makes the noise by which two correct evaluations differ.
    subject
        Of protocol 2; of an older one every check is skipped, with the reason.
    cases
        Where the tokens come from.
    proved
        See `measure_difference`.
    """
    chosen, left = split_checks(path_capabilities(subject), oracle.config)
    yield from left
    if not chosen:
        return
    max_seq_len, vocab_size = oracle.config.max_seq_len, oracle.config.vocab_size
    ids = rows_of(cases, max_seq_len, vocab_size)
    driver = Driver(subject, ids, vocab_size, max_seq_len)
    progress("paths: the forward they are held against")
    try:
        base = driver.forward(ids)
    except SubjectFailure as failure:
        yield Failure(Place(None, "paths"), "paths", str(failure), failure.detail)
        return
    golden, orders = evaluate(oracle, ids)
    for check in chosen:
        progress(f"paths: {check.name}")
        place = Place(None, f"paths.{check.name}")
        try:
            pieces = list(check.run(driver))
        except SubjectFailure as failure:
            yield Failure(place, "paths", str(failure), failure.detail)
            continue
        observed = np.concatenate([piece.logits for piece in pieces])
        table, truth, *others = (gather(whole, pieces) for whole in (base, golden, *orders))
        yield measure_difference(place, "paths", observed, table, truth, others, proved)


def evaluate(oracle: Oracle, ids: Array) -> tuple[Array, list[Array]]:
    """Return logits of the golden and of every order, float64 ``(batch, seq, vocab)``."""
    import torch

    part = oracle.part("embed")
    tensor = torch.from_numpy(np.array(ids)).to(oracle.device)
    every = (oracle.golden, *oracle.orders)
    streams = [part.embed(order, tensor)["hidden"] for order in every]
    for layer in range(oracle.config.n_layers):
        part = oracle.part(layer)
        pairs = zip(every, streams, strict=True)
        streams = [part.chain(order, stream)["output"] for order, stream in pairs]
    part = oracle.part("head")
    pairs = zip(every, streams, strict=True)
    logits = [
        flat(part.chain(order, stream)["logits"]).reshape(*ids.shape, -1) for order, stream in pairs
    ]
    return logits[0], logits[1:]
