"""Every field: what it means, what it defaults to, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.config import ConfigError, MPTConfig


def read(**top: Any) -> MPTConfig:
    return MPTConfig.from_dict(top)


def attention(**fields: Any) -> MPTConfig:
    return MPTConfig.from_dict({"attn_config": fields})


ORIGINAL_DEFAULTS = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "no_bias": False,
    "norm_type": "low_precision_layernorm",
    "learned_pos_emb": True,
    "attn_type": "multihead_attention",
    "kv_n_heads": 16,
    "qk_ln": False,
    "clip_qkv": None,
    "softmax_scale": None,
    "alibi": False,
    "alibi_bias_max": 8,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "logit_scale": None,
    "embedding_fraction": 1.0,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": None,
    "unknown": (),
}


@pytest.mark.parametrize(("name", "value"), ORIGINAL_DEFAULTS.items())
def test_a_missing_field_means_what_the_original_means(name: str, value: object) -> None:
    assert getattr(read(), name) == value
    assert getattr(MPTConfig(), name) == value


def test_a_partial_attn_config_is_filled_and_leaks_into_nothing() -> None:
    raw = {"attn_config": {"alibi": True, "clip_qkv": 6}}
    before = copy.deepcopy(raw)
    first = MPTConfig.from_dict(raw)
    assert raw == before
    assert (first.alibi, first.clip_qkv, first.qk_ln) == (True, 6.0, False)
    assert (read().alibi, read().clip_qkv) == (False, None)


@pytest.mark.parametrize(
    ("fields", "heads", "rows"),
    [
        ({}, 16, 3 * 2048),
        ({"attn_type": "multiquery_attention"}, 1, 2048 + 2 * 128),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 4}, 4, 2048 + 2 * 4 * 128),
        ({"attn_type": "multihead_attention", "kv_n_heads": 16}, 16, 3 * 2048),
        ({"attn_type": "Multiquery_Attention", "kv_n_heads": 1}, 1, 2048 + 2 * 128),
    ],
)
def test_key_value_heads_follow_the_attention_type(
    fields: dict[str, Any], heads: int, rows: int
) -> None:
    config = attention(**fields)
    assert (config.kv_n_heads, config.qkv_rows) == (heads, rows)


@pytest.mark.parametrize(
    ("alibi", "learned", "expected"),
    [(True, True, False), (True, False, False), (False, True, True), (False, False, False)],
)
def test_learned_positions_exist_only_without_alibi(
    alibi: bool, learned: bool, expected: bool
) -> None:
    config = read(learned_pos_emb=learned, attn_config={"alibi": alibi})
    assert config.has_wpe is expected


def test_scales() -> None:
    assert attention().scale == 1 / math.sqrt(128)
    assert attention(softmax_scale=2).scale == 2.0
    assert attention(softmax_scale=0).scale == 0.0
    assert read(logit_scale="inv_sqrt_d_model").logit_scale == 1 / math.sqrt(2048)
    assert read(logit_scale=0).logit_scale == 0.0


def test_a_clip_of_zero_is_no_clip() -> None:
    assert attention(clip_qkv=0).clip_qkv is None
    assert attention(clip_qkv=6).clip_qkv == 6.0


def test_expansion_may_be_a_fraction_of_a_whole_width() -> None:
    assert read(expansion_ratio=2.5).hidden_dim == 5120
    ratio = read(expansion_ratio=4.0).expansion_ratio
    assert (ratio, type(ratio)) == (4, int)


def test_epsilon_and_dtype_have_two_names() -> None:
    assert read(norm_eps=1e-3).layer_norm_epsilon == 1e-3
    assert read(norm_eps=1e-3, layer_norm_epsilon=1e-3).layer_norm_epsilon == 1e-3
    assert read(torch_dtype="bfloat16").torch_dtype == "bfloat16"
    assert read(dtype="torch.float16").torch_dtype == "float16"


def test_unknown_fields_are_named_and_known_idle_ones_are_not() -> None:
    config = read(
        init_device="cpu", resid_pdrop=0.1, flavour=1, attn_config={"attn_pdrop": 0.0, "spice": 2}
    )
    assert config.unknown == ("flavour", "attn_config.spice")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm"),
    ({"attn_config": {"attn_uses_sequence_id": True}}, "attn_config.attn_uses_sequence_id"),
    ({"attn_config": {"rope": True}}, "attn_config.rope"),
    ({"attn_config": {"qk_gn": True}}, "attn_config.qk_gn"),
    ({"attn_config": {"fused_qkv": False}}, "attn_config.fused_qkv"),
    ({"attn_config": {"sliding_window_size": 128}}, "attn_config.sliding_window_size"),
    ({"attn_config": {"attn_logit_softcapping": 30.0}}, "attn_config.attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"block_overrides": {"order": []}}, "block_overrides"),
    ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type"),
    ({"ffn_config": {"ffn_hidden_size": 64}}, "ffn_config.ffn_hidden_size"),
    (
        {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
        "ffn_config.ffn_act_fn",
    ),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"model_type": "llama"}, "model_type"),
    ({"norm_type": "batchnorm"}, "norm_type"),
    ({"attn_config": {"attn_type": "linear"}}, "attn_config.attn_type"),
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"d_model": "2048"}, "d_model"),
    ({"d_model": 2048.0}, "d_model"),
    ({"n_layers": True}, "n_layers"),
    ({"n_layers": 0}, "n_layers"),
    ({"n_heads": 10}, "n_heads"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"max_seq_len": None}, "max_seq_len"),
    ({"expansion_ratio": 0}, "expansion_ratio"),
    ({"expansion_ratio": 0.3}, "expansion_ratio"),
    ({"no_bias": 1}, "no_bias"),
    ({"learned_pos_emb": None}, "learned_pos_emb"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
    ({"logit_scale": "inv"}, "logit_scale"),
    ({"logit_scale": True}, "logit_scale"),
    ({"logit_scale": math.inf}, "logit_scale"),
    ({"embedding_fraction": 0}, "embedding_fraction"),
    ({"embedding_fraction": 1.5}, "embedding_fraction"),
    ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": 1e-5, "norm_eps": 1e-6}, "norm_eps"),
    ({"torch_dtype": 16}, "torch_dtype"),
    ({"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype"),
    ({"attn_config": None}, "attn_config"),
    ({"attn_config": [1]}, "attn_config"),
    ({"attn_config": {"alibi": "yes"}}, "attn_config.alibi"),
    ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max"),
    ({"attn_config": {"clip_qkv": "6"}}, "attn_config.clip_qkv"),
    ({"attn_config": {"clip_qkv": False}}, "attn_config.clip_qkv"),
    ({"attn_config": {"clip_qkv": -6}}, "attn_config.clip_qkv"),
    ({"attn_config": {"softmax_scale": math.nan}}, "attn_config.softmax_scale"),
    ({"attn_config": {"kv_n_heads": 4}}, "attn_config.kv_n_heads"),
    ({"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_config.kv_n_heads"),
    (
        {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 5}},
        "attn_config.kv_n_heads",
    ),
    (
        {"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": 2}},
        "attn_config.kv_n_heads",
    ),
]


@pytest.mark.parametrize(("raw", "field"), REFUSED + WRONG, ids=lambda value: str(value)[:50])
def test_what_is_refused_is_refused_by_name(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MPTConfig.from_dict(raw)
    error = caught.value
    assert error.field == field
    assert str(error).startswith(f"{field}: expected {error.expected}, found {error.found!r}")


IDLE: list[dict[str, Any]] = [
    {"model_type": "mpt"},
    {"ffn_config": None},
    {"ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu"}}},
    {"block_overrides": None},
    {"attn_config": {"rope": False, "sliding_window_size": -1, "attn_logit_softcapping": None}},
]


@pytest.mark.parametrize("raw", IDLE, ids=str)
def test_a_refused_field_at_its_idle_value_is_accepted(raw: dict[str, Any]) -> None:
    assert MPTConfig.from_dict(raw) == MPTConfig()


def test_a_config_is_an_object() -> None:
    with pytest.raises(ConfigError, match="an object"):
        MPTConfig.from_dict([])  # type: ignore[arg-type]


FIELDS = [
    *ORIGINAL_DEFAULTS,
    "attn_config",
    "ffn_config",
    "norm_eps",
    "dtype",
    "model_type",
    "rope",
]
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.just([])
)
OBJECTS = st.dictionaries(
    st.sampled_from(FIELDS),
    JUNK | st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4),
    max_size=5,
)


@settings(max_examples=200)
@given(OBJECTS)
def test_any_json_is_a_config_or_an_error_with_a_name(raw: dict[str, Any]) -> None:
    try:
        config = MPTConfig.from_dict(raw)
    except ConfigError as error:
        assert error.field.split(".")[0] in {*raw, "n_heads", "attn_config"}
    else:
        assert config.d_model % config.n_heads == 0
        assert config.n_heads % config.kv_n_heads == 0
        assert config.hidden_dim == config.expansion_ratio * config.d_model
