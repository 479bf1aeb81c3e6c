"""Hypothesis strategies: small configs with any feature, token ids, and both with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cases.synthetic import DEFAULT_PROFILE, ScaleProfile, make_checkpoint

Raw = Mapping[str, Any]
Ids = tuple[tuple[int, ...], ...]

NORMS = ("low_precision_layernorm", "layernorm", "rmsnorm", "low_precision_rmsnorm")
MAX_HEADS = 40
# Powers of two hide the interleaving of the slopes, and few heads hide half-precision slopes.
TELLING_HEADS = (3, 5, 7, 12, 24, 40)


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes
    ----------
    config
        In the original's field names.
    seed
        Of the weights; see `cases.synthetic`.
    ids
        Rows of equal length.
    """

    config: Raw
    seed: int
    ids: Ids

    def write(
        self, directory: Path, dtype: str, scale_profile: ScaleProfile = DEFAULT_PROFILE
    ) -> Path:
        """Write the checkpoint in the hub's layout."""
        return make_checkpoint(
            directory, self.config, seed=self.seed, dtype=dtype, scale_profile=scale_profile
        )


@st.composite
def configs(
    draw: st.DrawFn, *, max_layers: int = 3, max_width: int = 96, max_seq_len: int = 48
) -> dict[str, Any]:
    """Valid configs of every feature, shrinking to one head, one layer and the plain features.

    Parameters
    ----------
    draw
        Given by Hypothesis.
    max_layers, max_seq_len
        Largest values of these fields.
    max_width
        Largest `d_model`, at least 40 so that 40 heads fit.
    """
    heads = draw(st.one_of(st.integers(1, MAX_HEADS), st.sampled_from(TELLING_HEADS)))
    head_dim = draw(st.integers(1, max(1, max_width // heads)))
    attention = draw(attention_configs(heads))
    config: dict[str, Any] = {
        "model_type": "mpt",
        "d_model": heads * head_dim,
        "n_heads": heads,
        "n_layers": draw(st.integers(1, max_layers)),
        "expansion_ratio": draw(expansion_ratios(heads * head_dim)),
        "max_seq_len": draw(st.integers(1, max_seq_len)),
        "vocab_size": draw(st.integers(2, 200)),
        "no_bias": draw(st.sampled_from([True, False])),
        "norm_type": draw(st.sampled_from(NORMS)),
        "learned_pos_emb": draw(st.sampled_from([True, False])),
        "logit_scale": draw(
            st.one_of(st.none(), st.just("inv_sqrt_d_model"), st.sampled_from([0.125, 2, 0.5]))
        ),
        "embedding_fraction": draw(st.sampled_from([1.0, 1, 0.7, 0.1])),
        "attn_config": attention,
    }
    if draw(st.booleans()):
        config["tie_word_embeddings"] = draw(st.sampled_from([True, False]))
    return config


def expansion_ratios(d_model: int) -> st.SearchStrategy[int | float]:
    """Ratios that give a whole width; with an odd `d_model` only integers do."""
    ratios: list[int | float] = [4, 1, 2, 3]
    return st.sampled_from([*ratios, *([1.5, 2.5] if d_model % 2 == 0 else [])])


@st.composite
def attention_configs(draw: st.DrawFn, heads: int) -> dict[str, Any]:
    """An `attn_config` for this number of heads; fields at their defaults are at times left out."""
    kind = draw(
        st.sampled_from(["multihead_attention", "multiquery_attention", "grouped_query_attention"])
    )
    fields: dict[str, Any] = {
        "attn_type": kind,
        "qk_ln": draw(st.booleans()),
        "clip_qkv": draw(st.one_of(st.none(), st.sampled_from([0.5, 1, 1.5, 6]))),
        "softmax_scale": draw(st.one_of(st.none(), st.sampled_from([0.125, 0.5]))),
        "alibi": draw(st.sampled_from([True, True, False])),
        "alibi_bias_max": draw(st.sampled_from([8, 16, 4])),
    }
    if kind == "grouped_query_attention":
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        fields["kv_n_heads"] = draw(st.sampled_from(divisors))
    if draw(st.booleans()):
        fields |= {"attn_impl": "torch", "attn_pdrop": 0, "prefix_lm": False}
    else:
        # Left out, they take the original's defaults.
        defaults = {"attn_type": "multihead_attention", "qk_ln": False, "alibi_bias_max": 8}
        for name, value in defaults.items():
            if fields[name] == value:
                del fields[name]
    return fields


@st.composite
def token_ids(
    draw: st.DrawFn, config: Raw, *, max_batch: int = 3, max_length: int | None = None
) -> Ids:
    """Rows of equal length within the config's vocabulary and `max_seq_len`.

    Ends of the vocabulary and repeated tokens come often.
    """
    last = config["vocab_size"] - 1
    longest = min(config["max_seq_len"], max_length or config["max_seq_len"])
    length = draw(st.integers(1, longest))
    token = st.one_of(st.sampled_from([0, last]), st.integers(0, last))
    row = st.one_of(
        st.lists(token, min_size=length, max_size=length).map(tuple),
        token.map(lambda value: (value,) * length),
    )
    return draw(st.lists(row, min_size=1, max_size=max_batch).map(tuple))


@st.composite
def checkpoint_cases(
    draw: st.DrawFn, config_strategy: st.SearchStrategy[dict[str, Any]] | None = None
) -> Case:
    """A config, a seed for its weights, and ids for it."""
    config = draw(config_strategy if config_strategy is not None else configs())
    return Case(config, draw(st.integers(0, 2**16)), draw(token_ids(config)))


def varied_ids(config: Raw, seed: int, count: int, *, max_batch: int = 3) -> tuple[Ids, ...]:
    """Up to `count` different inputs for one config: what is compiled once is judged on all.

    The first is a single token, the second as long as the model takes; the others are of any length
    and batch. A third of them repeat one token, a third hold the ends of the vocabulary. They come
    from the seed alone: drawn one by one they would exhaust what Hypothesis draws for an example.
    Fewer come back where a tiny vocabulary and length allow no more.
    """
    random = np.random.default_rng([seed, 1])
    last, longest = config["vocab_size"] - 1, config["max_seq_len"]
    found: dict[Ids, None] = {}
    for attempt in range(4 * count):
        length = (1, longest)[attempt] if attempt < 2 else int(random.integers(1, longest + 1))
        rows = random.integers(0, last + 1, (int(random.integers(1, max_batch + 1)), length))
        if attempt % 3 == 1:
            rows[:] = rows[:, :1]
        elif attempt % 3 == 2:
            rows[random.random(rows.shape) < 0.5] = last
            rows[:, 0] = 0
        found[tuple(tuple(int(token) for token in row) for row in rows)] = None
        if len(found) == count:
            break
    return tuple(found)


def _attention(config: Raw, name: str, default: Any) -> Any:
    return config.get("attn_config", {}).get(name, default)


def _has_norm(norm: str, config: Raw) -> bool:
    return bool(config["norm_type"] == norm)


FEATURES: Mapping[str, Callable[[Raw], bool]] = {
    "alibi": lambda c: _attention(c, "alibi", False),
    "alibi_bias_max": lambda c: _attention(c, "alibi_bias_max", 8) != 8,
    "biases": lambda c: not c["no_bias"],
    "clip_qkv": lambda c: bool(_attention(c, "clip_qkv", None)),
    "embedding_fraction": lambda c: c["embedding_fraction"] != 1,
    "expansion_ratio": lambda c: c["expansion_ratio"] != 4,
    "fractional expansion_ratio": lambda c: c["expansion_ratio"] % 1 != 0,
    "grouped queries": lambda c: 1 < _attention(c, "kv_n_heads", 1) < c["n_heads"],
    "heads no power of two": lambda c: c["n_heads"] & (c["n_heads"] - 1) != 0,
    "learned positions": lambda c: c["learned_pos_emb"] and not _attention(c, "alibi", False),
    "logit_scale number": lambda c: isinstance(c["logit_scale"], int | float),
    "logit_scale inv_sqrt_d_model": lambda c: c["logit_scale"] == "inv_sqrt_d_model",
    "many heads": lambda c: c["n_heads"] > 32,
    "multi-head": lambda c: (
        _attention(c, "attn_type", "multihead_attention") == "multihead_attention"
    ),
    "multi-query": lambda c: _attention(c, "attn_type", "") == "multiquery_attention",
    "no positions": lambda c: not (c["learned_pos_emb"] or _attention(c, "alibi", False)),
    "odd width": lambda c: c["d_model"] % 2 == 1,
    "one head": lambda c: c["n_heads"] == 1,
    "partial attn_config": lambda c: "attn_type" not in c["attn_config"],
    "qk_ln": lambda c: _attention(c, "qk_ln", False),
    "several layers": lambda c: c["n_layers"] > 1,
    "softmax_scale": lambda c: _attention(c, "softmax_scale", None) is not None,
    "untied": lambda c: not c.get("tie_word_embeddings", True),
} | {norm: partial(_has_norm, norm) for norm in NORMS}
