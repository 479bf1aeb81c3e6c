"""Names and shapes of a checkpoint's tensors, as data: no model is known here.

The other rooms work out the same table for themselves; none of them imports this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

ATTENTION_DEFAULTS: dict[str, Any] = {
    "attn_type": "multihead_attention",
    "alibi": False,
    "qk_ln": False,
    "softmax_scale": None,
}


def key_value_heads(raw: Mapping[str, Any]) -> int:
    """Number of key/value heads of a config in the original's field names."""
    attention = ATTENTION_DEFAULTS | dict(raw.get("attn_config") or {})
    heads = int(raw.get("n_heads", 16))
    if attention["attn_type"] == "multiquery_attention":
        return 1
    if attention["attn_type"] == "grouped_query_attention":
        return int(attention["kv_n_heads"])
    return heads


def tensor_shapes(raw: Mapping[str, Any]) -> Shapes:
    """Shape of every tensor in checkpoint order, for a config in the original's field names.

    Parameters
    ----------
    raw
        Parsed config.json. Fields that are missing take the original's defaults. It is not
        validated: cases also need checkpoints of configs that a reader must refuse.

    Returns
    -------
    dict
        Name to shape; a linear weight is (output features, input features).
    """
    attention = ATTENTION_DEFAULTS | dict(raw.get("attn_config") or {})
    width = int(raw.get("d_model", 2048))
    heads = int(raw.get("n_heads", 16))
    hidden = round(raw.get("expansion_ratio", 4) * width)
    vocabulary = int(raw.get("vocab_size", 50368))
    narrow = key_value_heads(raw) * (width // heads)
    biased = not raw.get("no_bias", False)
    norm_biased = biased and "rms" not in str(raw.get("norm_type", "low_precision_layernorm"))
    shapes: Shapes = {"transformer.wte.weight": (vocabulary, width)}
    if raw.get("learned_pos_emb", True) and not attention["alibi"]:
        shapes["transformer.wpe.weight"] = (int(raw.get("max_seq_len", 2048)), width)

    def put(name: str, shape: tuple[int, ...], with_bias: bool) -> None:
        shapes[f"{name}.weight"] = shape
        if with_bias:
            shapes[f"{name}.bias"] = shape[:1]

    for layer in range(int(raw.get("n_layers", 24))):
        block = f"transformer.blocks.{layer}"
        put(f"{block}.norm_1", (width,), norm_biased)
        put(f"{block}.attn.Wqkv", (width + 2 * narrow, width), biased)
        if attention["qk_ln"]:
            put(f"{block}.attn.q_ln", (width,), biased)
            put(f"{block}.attn.k_ln", (narrow,), biased)
        put(f"{block}.attn.out_proj", (width, width), biased)
        put(f"{block}.norm_2", (width,), norm_biased)
        put(f"{block}.ffn.up_proj", (hidden, width), biased)
        put(f"{block}.ffn.down_proj", (width, hidden), biased)
    put("transformer.norm_f", (width,), norm_biased)
    if not raw.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes
