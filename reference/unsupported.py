"""What changes MPT's inference and is not supported: refused by name, never silently ignored."""

from __future__ import annotations

from reference.fields import ConfigError, Fields

_HINT = "this reference computes causal MPT without it; a verdict would be about another model"


def refuse_unsupported(top: Fields, attention: Fields) -> None:
    """Raise `ConfigError` for the first field that asks for something not supported.

    Parameters
    ----------
    top, attention
        The config and its ``attn_config``.
    """
    model_type = top.raw.get("model_type", "mpt")
    if model_type != "mpt":
        raise ConfigError("model_type", "'mpt'", model_type)
    for fields, flag in (
        (attention, "prefix_lm"),
        (attention, "attn_uses_sequence_id"),
        (attention, "rope"),
        (attention, "qk_gn"),
        (top, "is_encoder_decoder"),
    ):
        if fields.boolean(flag, False):
            raise ConfigError(fields.name(flag), "false", True, _HINT)
    if not attention.boolean("fused_qkv", True):
        raise ConfigError(attention.name("fused_qkv"), "true", False, _HINT)
    if attention.number("sliding_window_size", -1) > 0:
        name = attention.name("sliding_window_size")
        raise ConfigError(name, "-1", attention.raw["sliding_window_size"], _HINT)
    for fields, field in (
        (attention, "attn_logit_softcapping"),
        (top, "final_logit_softcapping"),
        (top, "block_overrides"),
    ):
        value = fields.raw.get(field)
        if value is not None:
            raise ConfigError(fields.name(field), "null", value, _HINT)
    _refuse_other_mlp(top)


def _refuse_other_mlp(top: Fields) -> None:
    if top.raw.get("ffn_config") is None:
        return
    mlp = top.child("ffn_config")
    kind = mlp.raw.get("ffn_type", "mptmlp")
    if kind != "mptmlp":
        raise ConfigError(mlp.name("ffn_type"), "'mptmlp'", kind, _HINT)
    width = mlp.raw.get("ffn_hidden_size")
    if width is not None:
        raise ConfigError(mlp.name("ffn_hidden_size"), "null", width, "use expansion_ratio")
    activation = mlp.raw.get("ffn_act_fn")
    if activation not in (None, {"name": "gelu"}, {"name": "gelu", "approximate": "none"}):
        exact = "null or the exact gelu"
        raise ConfigError(mlp.name("ffn_act_fn"), exact, activation, _HINT)
