from __future__ import annotations

import copy
import math

import pytest

from relax_impl.config import ConfigError, MPTConfig


def test_an_empty_file_means_the_defaults_of_the_original():
    config = MPTConfig.from_dict({})
    assert (config.d_model, config.n_heads, config.n_layers) == (2048, 16, 24)
    assert (config.expansion_ratio, config.hidden_dim) == (4, 8192)
    assert (config.max_seq_len, config.vocab_size) == (2048, 50368)
    assert not config.alibi and not config.no_bias and not config.qk_ln
    assert config.learned_pos_emb and config.has_wpe and config.tie_word_embeddings
    assert (config.clip_qkv, config.softmax_scale, config.logit_scale) == (None, None, None)
    assert (config.alibi_bias_max, config.kv_n_heads) == (8, 16)
    assert (config.norm_type, config.layer_norm_epsilon) == ("low_precision_layernorm", 1e-5)
    assert config.scale == 1 / math.sqrt(128)
    assert config.unknown == ()


def test_a_partial_attn_config_is_filled_and_left_as_it_was():
    raw = {"attn_config": {"alibi": True}}
    before = copy.deepcopy(raw)
    assert MPTConfig.from_dict(raw).alibi
    assert raw == before
    assert not MPTConfig.from_dict({"attn_config": {}}).alibi
    assert not MPTConfig.from_dict({"attn_config": None}).alibi


@pytest.mark.parametrize(
    ("raw", "attribute", "value"),
    [
        ({"attn_config": {"clip_qkv": 6}}, "clip_qkv", 6.0),
        ({"attn_config": {"clip_qkv": 0}}, "clip_qkv", None),
        ({"attn_config": {"attn_pdrop": 0.0, "attn_impl": "flash"}}, "unknown", ()),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "kv_n_heads", 1),
        (
            {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 4}},
            "kv_n_heads",
            4,
        ),
        ({"attn_config": {"softmax_scale": 0}}, "scale", 0.0),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale", 1 / math.sqrt(2048)),
        ({"logit_scale": 0}, "logit_scale", 0.0),
        ({"norm_eps": 1e-6}, "layer_norm_epsilon", 1e-6),
        ({"norm_type": "LayerNorm"}, "norm_type", "layernorm"),
        ({"dtype": "torch.float16"}, "torch_dtype", "float16"),
        ({"expansion_ratio": 1.5}, "hidden_dim", 3072),
        ({"attn_config": {"alibi": True}}, "has_wpe", False),
        ({"learned_pos_emb": False}, "has_wpe", False),
        ({"no_bias": False, "norm_type": "rmsnorm"}, "norm_has_bias", False),
        ({"attn_config": {"alibi": True, "mystery": 1}, "riddle": 2}, "unknown", None),
    ],
)
def test_values_are_resolved(raw, attribute, value):
    found = getattr(MPTConfig.from_dict(raw), attribute)
    assert found == (
        ("riddle", "attn_config.mystery") if value is None and raw.get("riddle") else value
    )


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"d_model": True}, "d_model"),
        ({"d_model": 2048.0}, "d_model"),
        ({"n_layers": 0}, "n_layers"),
        ({"n_heads": 3}, "n_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"no_bias": 1}, "no_bias"),
        ({"expansion_ratio": 1.0001}, "expansion_ratio"),
        ({"expansion_ratio": float("inf")}, "expansion_ratio"),
        ({"logit_scale": "sqrt"}, "logit_scale"),
        ({"logit_scale": True}, "logit_scale"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"embedding_fraction": 0}, "embedding_fraction"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"attn_config": []}, "attn_config"),
        ({"attn_config": {"clip_qkv": "6"}}, "attn_config.clip_qkv"),
        ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv"),
        ({"attn_config": {"clip_qkv": True}}, "attn_config.clip_qkv"),
        ({"attn_config": {"softmax_scale": float("nan")}}, "attn_config.softmax_scale"),
        ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max"),
        ({"attn_config": {"attn_type": "linear"}}, "attn_config.attn_type"),
        ({"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_config.kv_n_heads"),
        (
            {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}},
            "attn_config.kv_n_heads",
        ),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm"),
        ({"attn_config": {"attn_uses_sequence_id": True}}, "attn_config.attn_uses_sequence_id"),
        ({"attn_config": {"rope": True}}, "attn_config.rope"),
        ({"attn_config": {"sliding_window_size": 128}}, "attn_config.sliding_window_size"),
        ({"attn_config": {"attn_logit_softcapping": 30.0}}, "attn_config.attn_logit_softcapping"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(raw, field):
    with pytest.raises(ConfigError) as caught:
        MPTConfig.from_dict(raw)
    assert caught.value.field == field
    assert str(caught.value).startswith(field + ": expected ")
    assert repr(caught.value.found) in str(caught.value)
