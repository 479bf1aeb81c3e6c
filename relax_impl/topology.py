"""Which tensors an MPT checkpoint holds, and their shapes."""

from __future__ import annotations

from relax_impl.config import MPTConfig

Shapes = dict[str, tuple[int, ...]]


def embedding_topology(config: MPTConfig) -> Shapes:
    """Name and shape of the tensors in front of the first block."""
    shapes: Shapes = {"transformer.wte.weight": (config.vocab_size, config.d_model)}
    if config.has_wpe:
        shapes["transformer.wpe.weight"] = (config.max_seq_len, config.d_model)
    return shapes


def block_topology(config: MPTConfig) -> Shapes:
    """Name, relative to the block, and shape of the tensors of one block."""
    d, h = config.d_model, config.hidden_dim
    shapes: Shapes = {}

    def norm(name: str, width: int, has_bias: bool) -> None:
        shapes[f"{name}.weight"] = (width,)
        if has_bias:
            shapes[f"{name}.bias"] = (width,)

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if not config.no_bias:
            shapes[f"{name}.bias"] = (rows,)

    norm("norm_1", d, config.norm_has_bias)
    linear("attn.Wqkv", config.qkv_rows, d)
    if config.qk_ln:
        # Layer norms over the full width, whatever norm_type says.
        norm("attn.q_ln", d, not config.no_bias)
        norm("attn.k_ln", config.kv_dim, not config.no_bias)
    linear("attn.out_proj", d, d)
    norm("norm_2", d, config.norm_has_bias)
    linear("ffn.up_proj", h, d)
    linear("ffn.down_proj", d, h)
    return shapes


def head_topology(config: MPTConfig) -> Shapes:
    """Name and shape of the tensors after the last block; a tied head reuses `wte`."""
    shapes: Shapes = {"transformer.norm_f.weight": (config.d_model,)}
    if config.norm_has_bias:
        shapes["transformer.norm_f.bias"] = (config.d_model,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def topology(config: MPTConfig) -> Shapes:
    """Name and shape of every tensor, in the order of the checkpoint.

    Parameters
    ----------
    config
        The model.

    Returns
    -------
    dict
        Original tensor name to shape; linear weights are [output features, input features].
    """
    shapes = embedding_topology(config)
    block = block_topology(config)
    for layer in range(config.n_layers):
        shapes |= {f"transformer.blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | head_topology(config)
