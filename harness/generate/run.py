"""Generation: a prompt, chunk by chunk into a cache, and then a token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from harness.errors import BadInput
from harness.generate.sampling import Sampling, choose
from harness.subjects.protocol import Array

SCHEMA = "mpt-conform/generation/1"


@dataclass(frozen=True)
class Limits:
    """How long a generation may get.

    Attributes
    ----------
    new_tokens
        At most so many.
    chunk
        Tokens of the prompt a call; ``None`` for all at once.
    stops
        Ids that end it.
    """

    new_tokens: int
    chunk: int | None = None
    stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for option, value in (("--max-new-tokens", self.new_tokens), ("--chunk", self.chunk)):
            if value is not None and value < 1:
                raise BadInput("cannot be used", where=option, expected="1 or more", found=value)


@dataclass
class Trace:
    """What a generation did.

    Attributes
    ----------
    prefill_seconds, decode_seconds
        Wall-clock time of the model's calls; choosing and printing are not in it.
    steps
        Decode steps.
    prefill_work, decode_work
        What the port counted: positions through blocks and head, and scores.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    prefill_work: dict[str, int] = field(default_factory=dict)
    decode_work: dict[str, int] = field(default_factory=dict)


def require_room(config: Any, prompt: int, new_tokens: int) -> None:
    """Refuse what learned positions cannot hold; ALiBi goes on past max_seq_len.

    Raises
    ------
    BadInput
        If prompt and new tokens together pass the end of the position embedding.
    """
    if config.has_wpe and prompt + new_tokens > config.max_seq_len:
        raise BadInput(
            "the model has learned positions and they end there",
            where="config.json: max_seq_len",
            expected=f"prompt and new tokens of at most {config.max_seq_len}",
            found=f"{prompt} + {new_tokens}",
            hint="lower --max-new-tokens",
        )


def generate(
    decoder: Any, prompt: Sequence[int], sampling: Sampling, limits: Limits, trace: Trace
) -> Iterator[int]:
    """Yield new tokens, the stop token included.

    Parameters
    ----------
    decoder
        ``relax_impl.decoder.Decoder``.
    prompt
        Ids, not empty.
    trace
        Filled in on the way.
    """
    draws = sampling.generator()
    ids = np.array([prompt], np.int32)
    chunk = limits.chunk or ids.shape[1]

    before = _copy(decoder.work)
    logits, cache = _timed(
        trace, "prefill_seconds", partial(decoder.prefill, ids[:, :chunk], last=True)
    )
    for at in range(chunk, ids.shape[1], chunk):
        piece = ids[:, at : at + chunk]
        logits = _timed(trace, "prefill_seconds", partial(decoder.extend, cache, piece, last=True))
    trace.prefill_work = asdict(decoder.work - before)
    before = _copy(decoder.work)
    row: Array = logits[0, -1]
    for made in range(limits.new_tokens):
        token = choose(row, sampling, draws)
        yield token
        if token in limits.stops or made + 1 == limits.new_tokens:
            return
        step = np.array([token], np.int32)
        row = _timed(trace, "decode_seconds", partial(decoder.decode, cache, step))[0]
        trace.steps += 1
        trace.decode_work = asdict(decoder.work - before)


def _copy(work: Any) -> Any:
    return type(work)(**asdict(work))


def _timed(trace: Trace, field: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = call()
    setattr(trace, field, getattr(trace, field) + time.perf_counter() - start)
    return result
