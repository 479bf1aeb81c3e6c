"""The prompts for a checkpoint that comes with none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cases.prompts.loader import Prompt, PromptError, load_prompts

HERE = Path(__file__).resolve().parent
FULL = "full-length"
TEXTS = ("short", "long", "every-byte")


def default_prompts(
    vocab_size: int,
    max_seq_len: int,
    tokenizer_path: Path | None = None,
    *,
    max_tokens: int = 512,
    longest: int | None = None,
) -> tuple[Prompt, ...]:
    """Prompts that fit a checkpoint; the same ones every time.

    Among them, whatever the checkpoint: one token, two tokens, an odd length, one token repeated,
    both ends of the vocabulary, ids that are often padding, and as many tokens as fit.
    With a tokenizer also the texts of this folder, for ids as they occur in use. A text that does
    not fit is cut; of prompts that come out equal, the first stays.

    Parameters
    ----------
    vocab_size
        Ids are below it.
    max_seq_len
        Of the config.
    tokenizer_path
        A tokenizer.json, or None.
    max_tokens
        Bound on every prompt's length but one's.
    longest
        Bound on the length of the one that fills the model; `max_tokens` if None.

    Returns
    -------
    tuple of Prompt
        All of them with ids.

    Raises
    ------
    PromptError
        When a size is not positive, or a token of the tokenizer is outside the vocabulary.
    """
    limit = min(max_seq_len, max_tokens)
    full = min(max_seq_len, longest or max_tokens)
    for name, size in (("vocab_size", vocab_size), ("length", min(limit, full))):
        if size < 1:
            raise PromptError("default prompts", name, "at least 1", str(size))
    prompts: dict[tuple[int, ...], Prompt] = {}
    for name, ids in _by_ids(vocab_size, full):
        kept = ids if name == FULL else ids[:limit]
        prompts.setdefault(kept, Prompt(name, kept))
    for name in TEXTS if tokenizer_path else ():
        (loaded,) = load_prompts(HERE / f"{name}.txt")
        prompt = loaded.encode(tokenizer_path, vocab_size=vocab_size, max_tokens=limit)
        assert prompt.ids is not None
        prompts.setdefault(prompt.ids, prompt)
    return tuple(prompts.values())


def _by_ids(vocab_size: int, limit: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    generator = np.random.default_rng([vocab_size, limit])

    def draw(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, vocab_size, length).tolist())

    last = vocab_size - 1
    yield "one-token", draw(1)
    yield "two-tokens", draw(2)
    yield "odd-length", draw(37)
    yield "repeated-token", draw(1) * 33
    ends = [at for step in range(4) for at in (step, last - step)]
    yield "vocabulary-ends", tuple(min(max(at, 0), last) for at in [*ends, last, last, 0, 0, last])
    # 0 and 1 are what tokenizers often use for padding; no position is to be masked for them.
    yield "padding-like", (0,) * 5 + draw(9) + (min(1, last),) * 5
    yield FULL, draw(limit)
