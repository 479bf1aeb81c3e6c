"""What a run page shows beyond the report, gathered while the arrays are there.

Logits are let go case by case, so that a listener stands where they are judged. It hears the same
arrays and changes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.ledger.identity import inputs
from harness.measure.oracle import flat
from harness.pipeline import Evidence

WORST_TOKENS = 12
_POSITIONS = 256
"""A case's curve is thinned to this many points: more cannot be told apart on a screen."""


class Listener:
    """Hears the deployed logits of every case; ask it after the check.

    Attributes
    ----------
    inputs
        Digest of the token ids; empty if the subject was never run.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._positions: list[dict[str, Any]] = []
        self._tokens: list[dict[str, Any]] = []
        self._slopes: list[dict[str, float]] = []
        self.inputs = ""

    def hear(self, name: str, ids: Any, observed: Any, golden: Any) -> None:
        """Keep the divergence of every position of one case, and the tokens it is worst at."""
        seen, truth = _log_softmax(flat(observed)), _log_softmax(flat(golden))
        if not np.isfinite(seen).all():
            return
        divergence = (np.exp(truth) * (truth - seen)).sum(axis=1)
        batch, length = np.asarray(ids).shape
        table = divergence.reshape(batch, length)
        step = -(-length // _POSITIONS)
        starts = range(0, length, step)
        # Of the thinned points the worst counts, and of a batch the worst row.
        curve = [[at, float(table[:, at : at + step].max())] for at in starts]
        self._positions.append({"case": name, "kl": curve})
        tokens = np.asarray(ids)
        for at in np.argsort(-divergence)[:WORST_TOKENS]:
            row, column = divmod(int(at), length)
            before = tokens[row, max(0, column - 7) : column + 1]
            self._tokens.append(
                {
                    "case": name,
                    "position": column,
                    "kl": float(divergence[at]),
                    "before": [int(number) for number in before],
                    "golden": int(truth[at].argmax()),
                    "subject": int(seen[at].argmax()),
                }
            )

    def see(self, evidence: Evidence) -> None:
        """Measure the slopes once more, and note what the inputs were."""
        walk = evidence.walk
        self.inputs = inputs(stream.case for stream in walk.streams)
        if "attention_bias" in walk.offers and walk.config.alibi:
            self._slopes = slopes(walk)

    def extras(self) -> dict[str, Any]:
        """Return what was heard, with tokens in their text where there is a tokenizer."""
        worst = sorted(self._tokens, key=lambda token: -token["kl"])[:WORST_TOKENS]
        decode = _decoder(self._checkpoint)
        for token in worst:
            token["text"] = decode(token["before"])
            token["golden_text"] = decode([token["golden"]])
            token["subject_text"] = decode([token["subject"]])
        return {"positions": self._positions, "tokens": worst, "slopes": self._slopes}


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear every case's logits while a check runs in this process."""
    from harness.measure.run import Walk

    plain = Walk._logits

    def heard(self: Any, stream: Any, logits: Any, chained: Any) -> Any:
        listener.hear(stream.case.name, stream.case.ids, logits, stream.golden_logits)
        return plain(self, stream, logits, chained)

    Walk._logits = heard  # type: ignore[method-assign]
    try:
        yield
    finally:
        Walk._logits = plain  # type: ignore[method-assign]


def slopes(walk: Any) -> list[dict[str, float]]:
    """Return each head's slope, expected and measured: the bias' fall per key, by least squares."""
    from harness.measure.run import ALIBI_KEYS
    from harness.subjects.calls import SubjectFailure, call_bias
    from reference.alibi import slopes as expected_slopes

    config = walk.config
    keys = min(config.max_seq_len, ALIBI_KEYS)
    if keys < 2:
        return []
    try:
        bias = call_bias(walk.subject, config.n_heads, 1, keys)
    except SubjectFailure:
        return []
    table = np.broadcast_to(bias, (config.n_heads, 1, keys)).astype(np.float64)[:, 0]
    relative = table - table[:, -1:]
    distance = np.arange(keys - 1, -1, -1, dtype=np.float64)
    measured = -(relative @ distance) / (distance @ distance)
    expected = np.asarray(expected_slopes(config.n_heads, config.alibi_bias_max), np.float64)
    return [
        {"head": head, "expected": float(expected[head]), "measured": float(measured[head])}
        for head in range(config.n_heads)
    ]


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _decoder(checkpoint: Path) -> Any:
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return _as_ids
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def _as_ids(ids: Sequence[int]) -> str:
    return " ".join(f"#{number}" for number in ids)
