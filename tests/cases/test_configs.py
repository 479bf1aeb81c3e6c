"""The shipped configs say what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cases

CONFIGS = Path(cases.__file__).parent / "configs"

INSTRUCT = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}

# (d_model, n_heads, n_layers, max_seq_len, vocab_size), then what differs inside attn_config.
FAMILY = {
    "mpt-7b-instruct": ((4096, 32, 32, 2048, 50432), {}),
    "mpt-7b": ((4096, 32, 32, 2048, 50432), {}),
    "mpt-7b-chat": ((4096, 32, 32, 2048, 50432), {}),
    "mpt-7b-storywriter": ((4096, 32, 32, 65536, 50432), {"alibi_bias_max": 16, "clip_qkv": 6}),
    "mpt-7b-8k": ((4096, 32, 32, 8192, 50432), {"clip_qkv": 6}),
    "mpt-30b": ((7168, 64, 48, 8192, 50432), {}),
    "mpt-1b": ((2048, 16, 24, 2048, 50368), {"qk_ln": True}),
    "replit-code-v1.5": (
        (3072, 24, 32, 4096, 32768),
        {"attn_type": "grouped_query_attention", "kv_n_heads": 8},
    ),
}


def load(name: str) -> dict[str, object]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_instruct_is_the_published_file() -> None:
    # As text: equality in Python would take 0 for 0.0, and readers do not.
    assert json.dumps(load("mpt-7b-instruct")) == json.dumps(INSTRUCT)


def test_every_file_is_expected() -> None:
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name: str) -> None:
    sizes, attention = FAMILY[name]
    names = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
    expected = INSTRUCT | dict(zip(names, sizes, strict=True))
    expected["attn_config"] = INSTRUCT["attn_config"] | attention  # type: ignore[operator]
    found = load(name)
    if name == "replit-code-v1.5":
        expected["tokenizer_name"] = "replit/replit-code-v1_5-3b"
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
