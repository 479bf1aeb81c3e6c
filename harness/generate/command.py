"""``mpt-conform generate``: from a directory and a prompt to a stream of text and a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.generate.run import SCHEMA, Limits, Trace, generate, require_room
from harness.generate.sampling import Sampling
from harness.generate.text import Text
from harness.generate.verify import Agreement, require_greedy, verify


@dataclass(frozen=True)
class GenerateRequest:
    """Fields as the options of ``mpt-conform generate``."""

    checkpoint: Path
    prompt: str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    chunk: int | None = None
    dtype: str = "float16"
    target: str = "llvm"
    ignore_stop: bool = False
    verify: bool = False


@dataclass(frozen=True)
class Generation:
    """The record of a generation.

    Attributes
    ----------
    ids
        Prompt and new tokens.
    text
        Of the new tokens, as it was streamed.
    finish
        ``"stop"`` for a stop token, ``"length"`` for --max-new-tokens.
    seconds
        Wall-clock time of ``load``, ``prefill`` and ``decode``.
    tokens_per_second
        Decode steps by their time; ``None`` without any.
    work
        For ``prefill`` and ``decode``: calls, positions through the blocks and through the head,
        scores of one head and layer.
    agreement
        With full recomputation and the reference; ``None`` unless asked for.
    """

    schema: str
    checkpoint: str
    digest: str
    dtype: str
    target: str
    prompt: str
    text: str
    ids: list[int]
    prompt_tokens: int
    new_tokens: int
    finish: str
    chunk: int | None
    temperature: float
    top_p: float
    seed: int
    seconds: dict[str, float]
    tokens_per_second: float | None
    work: dict[str, dict[str, int]]
    agreement: Agreement | None = None


def run(request: GenerateRequest, show: Callable[[str], None]) -> Generation:
    """Generate; every piece of text goes to ``show`` as soon as it is complete.

    Raises
    ------
    BadInput
        If checkpoint, tokenizer, prompt or an option cannot be used.
    NotProven
        If the machine has no device for the target.
    """
    from harness.measure.oracle import Oracle
    from harness.pipeline import open_material
    from harness.subjects.load import load_subject
    from harness.subjects.protocol import rounding_of

    material = open_material(request.checkpoint)
    text = Text(request.checkpoint, material.checkpoint.config)
    prompt = text.encode(request.prompt)
    stops = frozenset() if request.ignore_stop else text.stops
    if request.verify:
        require_greedy(request.sampling)
    limits = Limits(request.max_new_tokens, request.chunk, stops)
    require_room(material.config, len(prompt), request.max_new_tokens)

    start = time.perf_counter()
    loaded = load_subject("relax", request.checkpoint, dtype=request.dtype, target=request.target)
    if loaded.subject is None:
        raise BadInput(loaded.failure, where=str(request.checkpoint))
    subject: Any = loaded.subject
    seconds = {"load": time.perf_counter() - start}

    trace, made, shown, stream = Trace(), list[int](), list[str](), text.stream()
    for token in generate(subject.decoder, prompt, request.sampling, limits, trace):
        made.append(token)
        piece = stream.push(token)
        shown.append(piece)
        show(piece)
    shown.append(stream.rest())
    show(shown[-1])
    seconds |= {"prefill": trace.prefill_seconds, "decode": trace.decode_seconds}
    agreement = None
    if request.verify:
        read, rounding = material.checkpoint.read, rounding_of(subject)
        oracle = Oracle(material.config, read, storage=request.dtype, rounding=rounding)
        agreement = verify(subject, oracle, prompt, made)
    return Generation(
        schema=SCHEMA,
        checkpoint=str(request.checkpoint),
        digest=material.checkpoint.digest,
        dtype=request.dtype,
        target=request.target,
        prompt=request.prompt,
        text="".join(shown),
        ids=[*prompt, *made],
        prompt_tokens=len(prompt),
        new_tokens=len(made),
        finish="stop" if made[-1] in stops else "length",
        chunk=request.chunk,
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        seed=request.sampling.seed,
        seconds=seconds,
        tokens_per_second=trace.steps / trace.decode_seconds if trace.steps else None,
        work={"prefill": trace.prefill_work, "decode": trace.decode_work},
        agreement=agreement,
    )


def summary(made: Generation) -> str:
    """Return the line that ends a generation."""
    prefill, decode = made.seconds["prefill"], made.seconds["decode"]
    rate = "" if made.tokens_per_second is None else f", {made.tokens_per_second:.1f} tokens/s"
    return (
        f"{made.new_tokens} new tokens after {made.prompt_tokens} ({made.finish}): "
        f"prompt {prefill:.3f} s, {made.new_tokens - 1} steps {decode:.3f} s{rate}"
    )
