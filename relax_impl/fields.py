"""Reading single fields of a `config.json`: types, ranges, defaults and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

NORM_TYPES = ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")
ATTN_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")

# Training, initialisation, bookkeeping and kernel choice: nothing here changes what is computed.
NEUTRAL = frozenset(
    {
        "model_type", "architectures", "auto_map", "_name_or_path", "name_or_path",
        "transformers_version", "resid_pdrop", "emb_pdrop", "attn_pdrop", "init_config",
        "init_device", "verbose", "use_cache", "is_encoder_decoder", "is_decoder",
        "tokenizer_name", "fc_type", "use_pad_tok_in_ffn", "bos_token_id", "eos_token_id",
        "pad_token_id", "initializer_range", "init_std", "activation_checkpointing",
        "loss_fn",
    }
)  # fmt: skip
NEUTRAL_ATTN = frozenset({"attn_impl", "attn_pdrop", "model_type"})

# What would change inference and is not implemented: the values under which it changes nothing.
_OFF = (None, False, 0, 0.0)
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "final_logit_softcapping": _OFF,
    "block_overrides": (None, {}, []),
    "scale_emb": (None, 1, 1.0),
}
REFUSED_ATTN: Mapping[str, tuple[Any, ...]] = {
    "prefix_lm": _OFF,
    "attn_uses_sequence_id": _OFF,
    "rope": _OFF,
    "attn_logit_softcapping": _OFF,
    "qk_gn": _OFF,
    "reuse_kv_layer_idx": (None,),
    "reuse_kv_x_layer_idx": (None,),
    "sliding_window_size": (None, -1, 0),
    "fused_qkv": (None, True),
    "attn_temperature_tuning": (None, {}),
}
# Known, but only read when what they belong to is switched on.
DEPENDENT_ATTN = frozenset(
    {
        "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "kv_n_heads",
    }
)  # fmt: skip
REFUSED_FFN = ("mptmlp",)
FFN_NEUTRAL = frozenset({"ffn_type", "fc_type"})

FIELDS = frozenset(
    {
        "d_model", "n_heads", "n_layers", "expansion_ratio", "max_seq_len", "vocab_size",
        "learned_pos_emb", "attn_config", "logit_scale", "no_bias", "embedding_fraction",
        "norm_type", "tie_word_embeddings", "layer_norm_epsilon", "norm_eps", "torch_dtype",
        "dtype", "ffn_config",
    }
)  # fmt: skip
FIELDS_ATTN = frozenset(
    {
        "attn_type", "qk_ln", "clip_qkv", "softmax_scale", "alibi", "alibi_bias_max",
    }
)  # fmt: skip


class ConfigError(ValueError):
    """A field of the configuration cannot be used.

    Attributes
    ----------
    field
        Dotted name of the field, for example ``attn_config.clip_qkv``.
    expected, found
        What would have been accepted, and what was there.
    """

    def __init__(self, field: str, expected: object, found: object) -> None:
        self.field = field
        self.expected = expected
        self.found = found
        super().__init__(f"{field}: expected {expected}, found {found!r}")


class Section:
    """One object of the file, with the dotted prefix its fields are reported under."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def name(self, key: str) -> str:
        """Dotted name of a field."""
        return self.prefix + key

    def flag(self, key: str, default: bool) -> bool:
        """Read a truth value."""
        found = self.values.get(key, default)
        if not isinstance(found, bool):
            raise ConfigError(self.name(key), "true or false", found)
        return found

    def count(self, key: str, default: int) -> int:
        """Read a positive integer; a truth value is none."""
        found = self.values.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ConfigError(self.name(key), "a positive integer", found)
        return found

    def number(self, key: str, default: float | None, *, positive: bool = False) -> Any:
        """Read a finite number, or None where that is the default."""
        found = self.values.get(key, default)
        if found is None and default is None:
            return None
        ok = not isinstance(found, bool) and isinstance(found, int | float) and math.isfinite(found)
        if not ok or (positive and not found > 0):
            wanted = "a positive finite number" if positive else "a finite number"
            raise ConfigError(self.name(key), wanted, found)
        return found

    def choice(self, key: str, default: str, choices: Iterable[str]) -> str:
        """Read one of several names, in whatever case."""
        found = self.values.get(key, default)
        if not isinstance(found, str) or found.lower() not in choices:
            raise ConfigError(self.name(key), "one of " + ", ".join(choices), found)
        return found.lower()

    def section(self, key: str) -> Section:
        """Read a nested object; a missing or null one is empty."""
        found = self.values.get(key)
        if found is None:
            found = {}
        if not isinstance(found, Mapping):
            raise ConfigError(self.name(key), "an object", found)
        return Section(found, self.name(key) + ".")

    def refuse(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        """Stop at a field that is set to something which would change the computation."""
        for key, harmless in table.items():
            found = self.values.get(key, harmless[0])
            if not any(found is value or found == value for value in harmless):
                wanted = " or ".join(dict.fromkeys(repr(value) for value in harmless))
                raise ConfigError(self.name(key), f"{wanted} (not implemented here)", found)

    def unknown(self, known: Iterable[str]) -> tuple[str, ...]:
        """Names of fields that are not among `known`."""
        known = frozenset(known)
        return tuple(self.name(key) for key in self.values if key not in known)


def _kv_heads(attn: Section, attn_type: str, n_heads: int) -> int:
    if attn_type == "multihead_attention":
        return n_heads
    if attn_type == "multiquery_attention":
        return 1
    if attn.values.get("kv_n_heads") is None:
        raise ConfigError(
            attn.name("kv_n_heads"), "a divisor of n_heads (grouped_query_attention needs it)", None
        )
    heads = attn.count("kv_n_heads", n_heads)
    if n_heads % heads:
        raise ConfigError(attn.name("kv_n_heads"), f"a divisor of n_heads = {n_heads}", heads)
    return heads


def _logit_scale(top: Section, d_model: int) -> float | None:
    found = top.values.get("logit_scale")
    if isinstance(found, str):
        if found != "inv_sqrt_d_model":
            raise ConfigError("logit_scale", "a number, null or 'inv_sqrt_d_model'", found)
        return 1.0 / math.sqrt(d_model)
    number = top.number("logit_scale", None)
    return None if number is None else float(number)


def _dtype(top: Section) -> str | None:
    for key in ("torch_dtype", "dtype"):
        found = top.values.get(key)
        if found is None:
            continue
        if not isinstance(found, str):
            raise ConfigError(key, "the name of a dtype or null", found)
        return found.removeprefix("torch.")
    return None


def _epsilon(top: Section) -> float:
    key = "norm_eps" if "norm_eps" in top.values else "layer_norm_epsilon"
    return float(top.number(key, 1e-5, positive=True))


def _expansion(top: Section, d_model: int) -> int | float:
    ratio: int | float = top.number("expansion_ratio", 4, positive=True)
    if d_model * ratio != int(d_model * ratio):
        raise ConfigError("expansion_ratio", f"an integer when multiplied by {d_model}", ratio)
    return ratio


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read a parsed `config.json` into the arguments of `MPTConfig`.

    Raises
    ------
    ConfigError
        Names the first field that cannot be used.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError("config", "an object", raw)
    top = Section(raw)
    attn = top.section("attn_config")
    ffn = top.section("ffn_config")
    top.refuse(REFUSED)
    attn.refuse(REFUSED_ATTN)
    ffn.choice("ffn_type", "mptmlp", REFUSED_FFN)

    d_model, n_heads = top.count("d_model", 2048), top.count("n_heads", 16)
    if d_model % n_heads:
        raise ConfigError("n_heads", f"a divisor of d_model = {d_model}", n_heads)
    attn_type = attn.choice("attn_type", "multihead_attention", ATTN_TYPES)
    # The original tests clip_qkv for truth: 0 means no clipping.
    clip = attn.number("clip_qkv", None)
    if clip is not None and clip < 0:
        raise ConfigError("attn_config.clip_qkv", "a positive number or null", clip)
    scale = attn.number("softmax_scale", None)
    unknown = top.unknown(FIELDS | NEUTRAL | REFUSED.keys())
    unknown += attn.unknown(FIELDS_ATTN | NEUTRAL_ATTN | DEPENDENT_ATTN | REFUSED_ATTN.keys())
    unknown += ffn.unknown(FFN_NEUTRAL)
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_layers": top.count("n_layers", 24),
        "expansion_ratio": _expansion(top, d_model),
        "max_seq_len": top.count("max_seq_len", 2048),
        "vocab_size": top.count("vocab_size", 50368),
        "no_bias": top.flag("no_bias", False),
        "norm_type": top.choice("norm_type", "low_precision_layernorm", NORM_TYPES),
        "learned_pos_emb": top.flag("learned_pos_emb", True),
        "attn_type": attn_type,
        "kv_n_heads": _kv_heads(attn, attn_type, n_heads),
        "qk_ln": attn.flag("qk_ln", False),
        "clip_qkv": float(clip) if clip else None,
        "softmax_scale": None if scale is None else float(scale),
        "alibi": attn.flag("alibi", False),
        "alibi_bias_max": attn.number("alibi_bias_max", 8, positive=True),
        "logit_scale": _logit_scale(top, d_model),
        "embedding_fraction": _fraction(top),
        "tie_word_embeddings": top.flag("tie_word_embeddings", True),
        "layer_norm_epsilon": _epsilon(top),
        "torch_dtype": _dtype(top),
        "unknown": unknown,
    }


def _fraction(top: Section) -> float:
    fraction = float(top.number("embedding_fraction", 1.0))
    if not 0 < fraction <= 1:
        raise ConfigError("embedding_fraction", "a number in (0, 1]", fraction)
    return fraction
