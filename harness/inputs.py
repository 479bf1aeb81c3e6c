"""From prompts to cases: token ids that the config accepts, or one clear sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import BadInput
from harness.measure.run import Case
from harness.subjects.protocol import Array


def check_ids(ids: Array, name: str, *, vocab_size: int, max_seq_len: int) -> Array:
    """Return ids as int32 ``(batch, seq)``.

    Raises
    ------
    BadInput
        For an empty prompt, an id outside the vocabulary or a sequence that is too long.
    """
    array = np.asarray(ids)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0:
        raise BadInput("the prompt is empty", where=name, expected="at least one token")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadInput("token ids must be integers", where=name, found=str(array.dtype))
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise BadInput(
            f"token id out of range at row {row}, position {column}",
            where=name,
            expected=f"0..{vocab_size - 1}",
            found=int(array[row, column]),
        )
    if array.shape[1] > max_seq_len:
        raise BadInput(
            "the sequence is longer than the model allows",
            where=f"{name} (config.json: max_seq_len)",
            expected=f"at most {max_seq_len} tokens",
            found=int(array.shape[1]),
        )
    return array.astype(np.int32)


# Long enough for every head's bias to matter, short enough to be judged in seconds.
DEFAULT_TOKENS = 128
# One prompt is as long as the model takes, so that no layer can be wrong at a distance that nobody
# looks at; up to here, and --max-tokens says otherwise.
LONGEST_TOKENS = 512


def load_cases(
    source: str | None, config: Any, checkpoint: Path, *, max_tokens: int | None
) -> tuple[Case, ...]:
    """Return the cases to run, named after their prompts.

    Parameters
    ----------
    source
        A prompt file or directory; the shipped prompts if ``None``.
    config
        Parsed config, for vocabulary and length.
    checkpoint
        Directory that may hold ``tokenizer.json``.
    max_tokens
        Cut every prompt after so many tokens.

    Raises
    ------
    BadInput
        If a prompt cannot be read or does not fit the config.
    """
    from cases.prompts import PromptError, default_prompts, load_prompts

    tokenizer = checkpoint / "tokenizer.json"
    vocabulary = tokenizer if tokenizer.is_file() else None
    try:
        if source is None:
            prompts = default_prompts(
                config.vocab_size,
                config.max_seq_len,
                vocabulary,
                max_tokens=max_tokens or DEFAULT_TOKENS,
                longest=max_tokens or LONGEST_TOKENS,
            )
        else:
            prompts = load_prompts(source)
        loaded = [(p.name, np.asarray(p.encode(vocabulary).ids)) for p in prompts]
    except PromptError as error:
        raise BadInput(str(error)) from error
    cases = []
    for name, ids in loaded:
        array = np.asarray(ids)
        cut = array[..., :max_tokens] if max_tokens is not None else array
        cases.append(
            Case(
                name,
                check_ids(cut, name, vocab_size=config.vocab_size, max_seq_len=config.max_seq_len),
            )
        )
    if not cases:
        raise BadInput("there are no prompts", where=source or "prompts")
    return (*cases, *_pair(cases))


def _pair(cases: Sequence[Case]) -> list[Case]:
    """Return a batch of two different rows of one length: rows must not leak into each other."""
    long = sorted((c for c in cases if c.ids.shape[0] == 1), key=lambda c: -c.ids.shape[1])[:2]
    if len(long) < 2:
        return []
    length = min(case.ids.shape[1] for case in long)
    return [Case("batch of two", np.concatenate([case.ids[:, :length] for case in long]))]
