"""One trial of a reduction: a small model made of a few fields, and what the gate says of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.pipeline import Request, check
from harness.report.record import Report

SEED = 0
# Ends, neighbours and a middle: with fewer ids there is no order of them to get wrong.
LEAST_VOCABULARY = 8
# A head of one channel has no order of channels, and a norm over so few is no norm.
LEAST_HEAD_DIM = 4


@dataclass(frozen=True)
class Signature:
    """What a failure is recognised by: where it is first seen, layers taken together, and how."""

    tap: str
    mode: str

    @classmethod
    def of(cls, report: Report) -> Signature | None:
        """Return the signature of a report, or ``None`` if it does not diverge."""
        first = report.first_divergence
        if report.verdict != "diverges":
            return None
        if first is None:
            return cls("tensors", "arrival")
        _, _, rest = first.tap.partition("transformer.blocks.")
        return cls(rest.partition(".")[2] or first.tap, first.mode)


@dataclass(frozen=True)
class Trial:
    """A failing check with everything that it is made of.

    Attributes
    ----------
    config
        config.json, in the original's field names.
    profile
        Fields of ``cases.synthetic.ScaleProfile``.
    ids
        Token ids, rows of one length.
    subject, fault, dtype, target
        As the options of ``check``.
    """

    config: Mapping[str, Any]
    profile: Mapping[str, Any]
    ids: tuple[tuple[int, ...], ...]
    subject: str
    fault: str | None
    dtype: str
    target: str

    def report(self) -> Report:
        """Make the model, and check."""
        from cases.synthetic import ScaleProfile, make_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            make_checkpoint(
                path,
                dict(self.config),
                seed=SEED,
                dtype="bfloat16",
                scale_profile=ScaleProfile(**self.profile),
            )
            prompts = Path(folder) / "ids.npy"
            np.save(prompts, np.array(self.ids))
            return check(
                Request(
                    checkpoint=path,
                    subject=self.subject,
                    dtype=self.dtype,
                    target=self.target,
                    prompts=str(prompts),
                    fault=self.fault,
                    diagnose=False,
                )
            )


def fields_of(config: Mapping[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """Return what can be made smaller: sizes first, then features, by dotted names."""
    from reference.config import MPTConfig

    parsed = MPTConfig.from_dict(dict(config))
    attention = config.get("attn_config", {})
    return {
        "n_layers": parsed.n_layers,
        "tokens": tokens,
        "rows": rows,
        "n_heads": parsed.n_heads,
        "head_dim": parsed.head_dim,
        "expansion_ratio": parsed.expansion_ratio,
        "vocab_size": parsed.vocab_size,
        "kv_n_heads": parsed.kv_n_heads,
        "attn_config.qk_ln": parsed.qk_ln,
        "attn_config.clip_qkv": parsed.clip_qkv,
        "attn_config.softmax_scale": attention.get("softmax_scale"),
        "attn_config.alibi_bias_max": parsed.alibi_bias_max,
        "logit_scale": config.get("logit_scale"),
        "embedding_fraction": parsed.embedding_fraction,
        "no_bias": parsed.no_bias,
        "tie_word_embeddings": parsed.tie_word_embeddings,
        "norm_type": parsed.norm_type,
    }


_SIZES: Mapping[str, Sequence[int]] = {
    "n_layers": (1, 2, 3),
    "tokens": (1, 2, 3, 4, 6, 8, 16, 32, 64, 65, 96, 128, 256),
    "rows": (1, 2),
    "n_heads": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16),
    "head_dim": (LEAST_HEAD_DIM, 8, 16),
    "expansion_ratio": (1, 2),
    "vocab_size": (LEAST_VOCABULARY, 16, 64, 256),
}
_PLAIN: Mapping[str, Any] = {
    "attn_config.qk_ln": False,
    "attn_config.clip_qkv": None,
    "attn_config.softmax_scale": None,
    "attn_config.alibi_bias_max": 8,
    "logit_scale": None,
    "embedding_fraction": 1.0,
    "no_bias": True,
    "tie_word_embeddings": True,
    "norm_type": "low_precision_layernorm",
}
# As many as show a fault where one might: with one token there is nothing to attend to, and one
# head has no neighbour to be taken for.
FEW = {"tokens": 4, "n_heads": 2}


def smaller(fields: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return smaller values of a field, smallest first: sizes down, features to what is plain."""
    value = fields[name]
    if name == "kv_n_heads":
        # One key head for each query head is what is plain; fewer are a feature.
        heads = fields["n_heads"]
        return () if value == heads else (heads,)
    if name in _SIZES:
        least = FEW.get(name, 1)
        return tuple(n for n in _SIZES[name] if least <= n < value)
    return () if value == _PLAIN[name] else (_PLAIN[name],)


def trial_of(fields: Mapping[str, Any], base: Trial, longest: int) -> Trial:
    """Return the trial that fields describe.

    Parameters
    ----------
    fields
        As ``fields_of`` has them.
    base
        Gives everything else.
    longest
        ``max_seq_len`` of the original config: it bounds the tokens and is never exceeded.
    """
    heads, kv_heads = fields["n_heads"], fields["kv_n_heads"]
    if heads % kv_heads or kv_heads > heads:
        kv_heads = heads if fields["kv_n_heads"] >= heads else _divisor(heads, kv_heads)
    attention = dict(base.config.get("attn_config", {}))
    attention |= {
        name.partition(".")[2]: value
        for name, value in fields.items()
        if name.startswith("attn_config.")
    }
    if kv_heads == heads:
        attention["attn_type"] = "multihead_attention"
        attention.pop("kv_n_heads", None)
    elif kv_heads == 1:
        attention["attn_type"] = "multiquery_attention"
        attention.pop("kv_n_heads", None)
    else:
        attention |= {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}
    plain = {
        name: fields[name]
        for name in (
            "n_layers",
            "n_heads",
            "expansion_ratio",
            "vocab_size",
            "logit_scale",
            "embedding_fraction",
            "no_bias",
            "tie_word_embeddings",
            "norm_type",
        )
    }
    config = dict(base.config) | plain
    config |= {"d_model": heads * fields["head_dim"], "attn_config": attention}
    tokens = min(fields["tokens"], longest)
    vocabulary = fields["vocab_size"]
    ids = np.random.default_rng(SEED).integers(0, vocabulary, (fields["rows"], tokens))
    fault = base.fault
    if fault is not None and "@" in fault:
        name, _, layer = fault.partition("@")
        fault = f"{name}@{min(int(layer), fields['n_layers'] - 1)}"
    return Trial(
        config, base.profile, tuple(tuple(map(int, row)) for row in ids), base.subject, fault,
        base.dtype, base.target,
    )  # fmt: skip


def _divisor(heads: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if heads % n == 0)
