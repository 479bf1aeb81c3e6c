"""MPT's config.json: every field that changes inference, with the defaults of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reference.fields import ConfigError, Fields
from reference.unsupported import refuse_unsupported

__all__ = ["ConfigError", "MPTConfig"]

NORM_TYPES = ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")
ATTENTION_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")

# Read below, or refused by `refuse_unsupported`, or of no influence on inference without padding:
# dropout, initialisation, implementation choices, tokenizer ids, bookkeeping of transformers.
_TOP_FIELDS = """
    model_type d_model n_heads n_layers expansion_ratio max_seq_len vocab_size no_bias norm_type
    learned_pos_emb attn_config logit_scale embedding_fraction tie_word_embeddings norm_eps
    layer_norm_epsilon torch_dtype dtype use_cache is_encoder_decoder ffn_config block_overrides
    final_logit_softcapping
    resid_pdrop emb_pdrop init_config init_device verbose initializer_range fc_type
    use_pad_tok_in_ffn tokenizer_name architectures auto_map transformers_version _name_or_path name
    bos_token_id eos_token_id pad_token_id output_attentions output_hidden_states return_dict
"""
_ATTENTION_FIELDS = """
    attn_type kv_n_heads qk_ln clip_qkv softmax_scale alibi alibi_bias_max prefix_lm
    attn_uses_sequence_id
    rope qk_gn fused_qkv sliding_window_size attn_logit_softcapping
    rope_theta rope_impl rope_dail_config rope_hf_config attn_pdrop attn_impl model_type
"""
_KNOWN = frozenset(_TOP_FIELDS.split())
_KNOWN_ATTENTION = frozenset(_ATTENTION_FIELDS.split())


@dataclass(frozen=True)
class MPTConfig:
    """What one MPT computes.

    Make it with `from_dict`, which checks what this class takes for granted: whole divisions,
    finite numbers, known variants.

    Attributes
    ----------
    expansion_ratio
        Width of the MLP in units of `d_model`; the product is a whole number.
    kv_n_heads
        Number of key/value heads: `n_heads` (multi-head), 1 (multi-query) or a divisor of it.
    clip_qkv
        Bound of the fused projection, or None. Zero means None, as in the original.
    softmax_scale
        Factor of ``q k^T``, or None for ``1/sqrt(head_dim)``; see `scale`.
    logit_scale
        Factor of the logits, or None. Zero is a factor, as in the original.
    unknown
        Dotted names of fields that this reference does not know.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    no_bias: bool = False
    norm_type: str = "low_precision_layernorm"
    learned_pos_emb: bool = True
    attn_type: str = "multihead_attention"
    kv_n_heads: int = 16
    qk_ln: bool = False
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    alibi: bool = False
    alibi_bias_max: float = 8
    prefix_lm: bool = False
    attn_uses_sequence_id: bool = False
    logit_scale: float | None = None
    embedding_fraction: float = 1.0
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    torch_dtype: str | None = None
    unknown: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP."""
        return int(self.expansion_ratio * self.d_model)

    @property
    def kv_dim(self) -> int:
        """Width of all keys (or values) of one token."""
        return self.kv_n_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all queries, then all keys, then all values."""
        return self.d_model + 2 * self.kv_dim

    @property
    def has_wpe(self) -> bool:
        """Whether there are learned positions. ALiBi wins: released configs ask for both."""
        return self.learned_pos_emb and not self.alibi

    @property
    def is_rms(self) -> bool:
        """Whether the norms of the stream are RMSNorm; those never have a bias."""
        return self.norm_type.endswith("rmsnorm")

    @property
    def scale(self) -> float:
        """The factor of ``q k^T``."""
        return 1 / math.sqrt(self.head_dim) if self.softmax_scale is None else self.softmax_scale

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> MPTConfig:
        """Read a parsed config.json that uses the field names of the original.

        Parameters
        ----------
        raw
            The parsed file. Missing fields take the defaults of the original (llm-foundry), which
            are not those of transformers: without a word, ``alibi`` and ``no_bias`` are false.
            `raw` is left as it is.

        Raises
        ------
        ConfigError
            A value of the wrong type, out of range, contradictory, or for something that would
            change inference and that is not supported.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError("config", "an object of fields", raw)
        top = Fields(raw)
        attention = top.child("attn_config")
        refuse_unsupported(top, attention)
        d_model = top.count("d_model", 2048)
        n_heads = top.count("n_heads", 16)
        if d_model % n_heads:
            raise ConfigError("n_heads", f"a divisor of d_model {d_model}", n_heads)
        attn_type = attention.choice("attn_type", "multihead_attention", ATTENTION_TYPES)
        return MPTConfig(
            d_model=d_model,
            n_heads=n_heads,
            n_layers=top.count("n_layers", 24),
            expansion_ratio=_expansion_ratio(top, d_model),
            max_seq_len=top.count("max_seq_len", 2048),
            vocab_size=top.count("vocab_size", 50368),
            no_bias=top.boolean("no_bias", False),
            norm_type=top.choice("norm_type", "low_precision_layernorm", NORM_TYPES),
            learned_pos_emb=top.boolean("learned_pos_emb", True),
            attn_type=attn_type,
            kv_n_heads=_kv_n_heads(attention, attn_type, n_heads),
            qk_ln=attention.boolean("qk_ln", False),
            clip_qkv=_clip_qkv(attention),
            softmax_scale=attention.optional_number("softmax_scale"),
            alibi=attention.boolean("alibi", False),
            alibi_bias_max=attention.positive("alibi_bias_max", 8),
            logit_scale=_logit_scale(top, d_model),
            embedding_fraction=_embedding_fraction(top),
            tie_word_embeddings=top.boolean("tie_word_embeddings", True),
            layer_norm_epsilon=_epsilon(top),
            torch_dtype=_dtype(top),
            unknown=top.unknown(_KNOWN) + attention.unknown(_KNOWN_ATTENTION),
        )


def _expansion_ratio(top: Fields, d_model: int) -> float:
    ratio = top.positive("expansion_ratio", 4)
    width = ratio * d_model
    if width != int(width):
        expected = f"a number that makes a whole width of d_model {d_model}"
        raise ConfigError("expansion_ratio", expected, ratio)
    return int(ratio) if ratio == int(ratio) else ratio


def _kv_n_heads(attention: Fields, attn_type: str, n_heads: int) -> int:
    name = attention.name("kv_n_heads")
    given = attention.raw.get("kv_n_heads")
    if attn_type == "grouped_query_attention":
        if given is None:
            raise ConfigError(name, f"a divisor of n_heads {n_heads}", given)
        count = attention.count("kv_n_heads", 1)
        if n_heads % count:
            raise ConfigError(name, f"a divisor of n_heads {n_heads}", count)
        return count
    implied = n_heads if attn_type == "multihead_attention" else 1
    if given is not None and attention.count("kv_n_heads", implied) != implied:
        raise ConfigError(name, f"{implied}, or null, with attn_type {attn_type}", given)
    return implied


def _clip_qkv(attention: Fields) -> float | None:
    clip = attention.optional_number("clip_qkv")
    if clip is not None and clip < 0:
        raise ConfigError(attention.name("clip_qkv"), "null or a number not below 0", clip)
    return clip or None


def _logit_scale(top: Fields, d_model: int) -> float | None:
    value = top.raw.get("logit_scale")
    if isinstance(value, str):
        if value != "inv_sqrt_d_model":
            raise ConfigError("logit_scale", "null, a number or 'inv_sqrt_d_model'", value)
        return 1 / math.sqrt(d_model)
    return top.optional_number("logit_scale")


def _embedding_fraction(top: Fields) -> float:
    fraction = top.positive("embedding_fraction", 1.0)
    if fraction > 1:
        raise ConfigError("embedding_fraction", "a number above 0 and not above 1", fraction)
    return fraction


def _epsilon(top: Fields) -> float:
    epsilon = top.positive("layer_norm_epsilon", 1e-5)
    if "norm_eps" not in top.raw:
        return epsilon
    other = top.positive("norm_eps", 1e-5)
    if "layer_norm_epsilon" in top.raw and other != epsilon:
        raise ConfigError("norm_eps", f"the value of layer_norm_epsilon, {epsilon}", other)
    return other


def _dtype(top: Fields) -> str | None:
    values = [(key, top.raw[key]) for key in ("torch_dtype", "dtype") if top.raw.get(key)]
    for key, value in values:
        if not isinstance(value, str):
            raise ConfigError(key, "the name of a dtype, such as bfloat16", value)
    if len({value for _, value in values}) > 1:
        raise ConfigError("dtype", f"the value of torch_dtype, {values[0][1]!r}", values[1][1])
    return str(values[0][1]).removeprefix("torch.") if values else None
