"""Which fields of a config transformers' MPT honours, and its own config made from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.mpt.configuration_mpt import MptConfig

from reference.config import MPTConfig


@dataclass(frozen=True)
class IgnoredField:
    """A field of a config that transformers reads past.

    Attributes
    ----------
    field
        Dotted name.
    value
        What the config means, defaults of the original included.
    instead
        What transformers computes whatever the field says.
    """

    field: str
    value: object
    instead: str

    def __str__(self) -> str:
        return f"{self.field} is {self.value!r}, transformers computes with {self.instead}"


class NotHonoured(ValueError):
    """The config asks for something that transformers does not compute.

    Parameters
    ----------
    fields
        All fields concerned; kept as an attribute.
    """

    def __init__(self, fields: tuple[IgnoredField, ...]) -> None:
        self.fields = fields
        super().__init__("; ".join(str(field) for field in fields))


def ignored_fields(raw: Mapping[str, Any]) -> tuple[IgnoredField, ...]:
    """Return the fields whose meaning transformers 5 does not honour, by running found out.

    Parameters
    ----------
    raw
        Parsed config.json with the original's names. A missing field means what it means to the
        original, so that an empty config is full of them: there, ``alibi`` is false and there are
        biases.

    Raises
    ------
    ConfigError
        The config is no MPT at all.

    Notes
    -----
    Not listed: ``embedding_fraction``, which transformers never reads but which changes nothing in
    inference; ``learned_pos_emb`` beside ALiBi, where the original has no positions either; and a
    ``logit_scale`` of 1.
    """
    attention = raw.get("attn_config", {})
    modes = {"prefix_lm": "a causal mask", "attn_uses_sequence_id": "one sequence"}
    found = [
        IgnoredField(f"attn_config.{mode}", True, instead)
        for mode, instead in modes.items()
        if isinstance(attention, Mapping) and attention.get(mode) is True
    ]
    if found:
        # The reference refuses these two by name; the rest of the config is still worth reading.
        raw = {**raw, "attn_config": {k: v for k, v in attention.items() if k not in modes}}
    config = MPTConfig.from_dict(raw)
    clauses: tuple[tuple[bool, str, object, str], ...] = (
        (not config.alibi, "attn_config.alibi", config.alibi, "ALiBi"),
        (
            config.alibi and config.alibi_bias_max != 8,
            "attn_config.alibi_bias_max",
            config.alibi_bias_max,
            "8",
        ),
        (config.has_wpe, "learned_pos_emb", True, "no learned positions"),
        (
            config.kv_n_heads != config.n_heads,
            "attn_config.attn_type",
            config.attn_type,
            f"{config.n_heads} key/value heads",
        ),
        (config.qk_ln, "attn_config.qk_ln", True, "plain queries and keys"),
        (not config.no_bias, "no_bias", False, "no biases"),
        (config.expansion_ratio != 4, "expansion_ratio", config.expansion_ratio, "4"),
        (config.is_rms, "norm_type", config.norm_type, "layernorm"),
        (config.logit_scale not in (None, 1), "logit_scale", config.logit_scale, "no scale"),
    )
    found += [IgnoredField(name, value, instead) for says, name, value, instead in clauses if says]
    return tuple(found)


def hub_config(config: MPTConfig) -> MptConfig:
    """Make transformers' config from the meaning of the original's.

    Its strict types reject what released configs hold (``clip_qkv: 6``, ``attn_pdrop: 0.0``), so
    that numbers are brought into the one form that it takes. Fields that it ignores keep its
    defaults.
    """
    attention = {
        "clip_qkv": config.clip_qkv,
        "softmax_scale": config.softmax_scale,
        "attn_pdrop": 0,
        "alibi": True,
    }
    return MptConfig(
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_layers=config.n_layers,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_config=attention,
        attn_implementation="eager",
    )
