"""A checkpoint as a GGUF file, with the fields that llama.cpp's own converter writes for MPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.subjects.protocol import Array


def write(
    path: Path,
    raw: Mapping[str, Any],
    names: tuple[str, ...],
    read: Callable[[str], Array],
    dtype: str,
) -> Path:
    """Write a file and return its path.

    Parameters
    ----------
    raw
        config.json; ``expansion_ratio``, ``softmax_scale`` and ``logit_scale`` have no field, as in
        the converter.
    names, read
        The tensors.
    dtype
        Of matrices; what has one axis is float32, as in the converter.
    """
    import gguf

    attention = raw.get("attn_config", {})
    arch = gguf.MODEL_ARCH.MPT
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(raw["max_seq_len"])
    writer.add_embedding_length(raw["d_model"])
    writer.add_block_count(raw["n_layers"])
    writer.add_feed_forward_length(4 * raw["d_model"])
    writer.add_head_count(raw["n_heads"])
    if attention.get("kv_n_heads"):
        writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_layer_norm_eps(1e-5)
    if attention.get("clip_qkv") is not None:
        writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_max_alibi_bias(
        float(attention.get("alibi_bias_max", 8)) if attention.get("alibi") else 0.0
    )
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("none")
    known = gguf.get_tensor_name_map(arch, raw["n_layers"])
    for name in names:
        array = np.asarray(read(name))
        wide = array.ndim == 1 or dtype == "float32"
        stored = array.astype(np.float32 if wide else np.float16)
        there = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ValueError(f"llama.cpp's MPT has no place for {name}")
        writer.add_tensor(there, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
