"""The tensors of released models, and what each field adds or takes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reference.config import MPTConfig
from reference.topology import block_shapes, embed_shapes, head_shapes, topology

RELEASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "mpt-7b": (
        {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
        194,
        6_649_286_656,
    ),
    "mpt-30b": (
        {"d_model": 7168, "n_heads": 64, "n_layers": 48, "vocab_size": 50432},
        290,
        29_957_200_896,
    ),
    "replit-code-v1_5-3b": (
        {
            "d_model": 3072,
            "n_heads": 24,
            "n_layers": 32,
            "vocab_size": 32768,
            "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8},
        },
        194,
        3_322_088_448,
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_released_models_have_their_published_size(name: str) -> None:
    fields, tensors, parameters = RELEASES[name]
    fields = fields | {
        "no_bias": True,
        "attn_config": fields.get("attn_config", {}) | {"alibi": True},
    }
    shapes = topology(MPTConfig.from_dict(fields))
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


PLAIN_BLOCK = {
    "norm_1.weight": (8,),
    "attn.Wqkv.weight": (24, 8),
    "attn.out_proj.weight": (8, 8),
    "norm_2.weight": (8,),
    "ffn.up_proj.weight": (32, 8),
    "ffn.down_proj.weight": (8, 32),
}


def make(attention: dict[str, Any] | None = None, **top: Any) -> MPTConfig:
    base = {"d_model": 8, "n_heads": 4, "n_layers": 2, "vocab_size": 5, "max_seq_len": 7}
    fields = {"alibi": True} | (attention or {})
    return MPTConfig.from_dict(base | {"no_bias": True} | top | {"attn_config": fields})


def test_a_plain_model_in_checkpoint_order() -> None:
    expected = {"transformer.wte.weight": (5, 8)}
    for layer in range(2):
        expected |= {f"transformer.blocks.{layer}.{n}": s for n, s in PLAIN_BLOCK.items()}
    expected |= {"transformer.norm_f.weight": (8,)}
    assert list(topology(make()).items()) == list(expected.items())


def test_biases_go_everywhere_but_to_embeddings() -> None:
    shapes = topology(make(no_bias=False, tie_word_embeddings=False))
    weights = [n for n in shapes if n.endswith(".weight")]
    bare = {"transformer.wte.weight", "lm_head.weight"}
    assert {n.replace(".bias", ".weight") for n in shapes if n.endswith("bias")} == {
        *weights
    } - bare
    assert shapes["transformer.blocks.0.attn.Wqkv.bias"] == (24,)
    assert shapes["transformer.blocks.0.ffn.down_proj.bias"] == (8,)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "low_precision_rmsnorm"])
def test_rms_norms_of_the_stream_have_no_bias_but_those_of_queries_and_keys_do(
    norm_type: str,
) -> None:
    shapes = block_shapes(make({"qk_ln": True}, no_bias=False, norm_type=norm_type))
    assert "norm_1.bias" not in shapes
    assert "norm_2.bias" not in shapes
    assert shapes["attn.q_ln.bias"] == (8,)


@pytest.mark.parametrize(
    ("attention", "rows", "key_width"),
    [
        ({}, 24, 8),
        ({"attn_type": "multiquery_attention"}, 12, 2),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, 16, 4),
    ],
)
def test_query_and_key_norms_span_all_heads(
    attention: dict[str, Any], rows: int, key_width: int
) -> None:
    shapes = block_shapes(make({"qk_ln": True} | attention))
    assert shapes["attn.Wqkv.weight"] == (rows, 8)
    assert shapes["attn.q_ln.weight"] == (8,)
    assert shapes["attn.k_ln.weight"] == (key_width,)
    names = list(shapes)
    assert names.index("attn.q_ln.weight") == names.index("attn.Wqkv.weight") + 1
    assert names.index("attn.k_ln.weight") == names.index("attn.out_proj.weight") - 1


def test_learned_positions_and_an_unembedding_of_its_own() -> None:
    config = make({"alibi": False}, tie_word_embeddings=False)
    assert embed_shapes(config)["transformer.wpe.weight"] == (7, 8)
    assert list(topology(config))[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert list(topology(config))[-1] == "lm_head.weight"
    assert "lm_head.weight" in head_shapes(config)
    assert "transformer.wte.weight" in head_shapes(make())


def test_the_width_of_the_mlp_follows_the_ratio() -> None:
    assert block_shapes(make(expansion_ratio=2.5))["ffn.up_proj.weight"] == (20, 8)
