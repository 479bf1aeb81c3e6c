"""Which tensors an MPT checkpoint holds, in its order, as a function of the config alone."""

from __future__ import annotations

from reference.config import MPTConfig

Shape = tuple[int, ...]

LAYER_PREFIX = "transformer.blocks.{}."


def topology(config: MPTConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of the checkpoint.

    Parameters
    ----------
    config
        The model.

    Returns
    -------
    dict
        Original tensor name to shape, in checkpoint order. A tied unembedding is no tensor of its
        own. Matrices are (output features, input features).
    """
    shapes = embed_shapes(config)
    block = block_shapes(config)
    for layer in range(config.n_layers):
        prefix = LAYER_PREFIX.format(layer)
        shapes |= {prefix + name: shape for name, shape in block.items()}
    shapes |= _norm("transformer.norm_f", config.d_model, config, rms=config.is_rms)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def embed_shapes(config: MPTConfig) -> dict[str, Shape]:
    """Return the shapes of the embedding tables."""
    shapes: dict[str, Shape] = {"transformer.wte.weight": (config.vocab_size, config.d_model)}
    if config.has_wpe:
        shapes["transformer.wpe.weight"] = (config.max_seq_len, config.d_model)
    return shapes


def block_shapes(config: MPTConfig) -> dict[str, Shape]:
    """Return the shapes of one block's tensors, named relative to the block."""
    width = config.d_model
    shapes = _norm("norm_1", width, config, rms=config.is_rms)
    shapes |= _linear("attn.Wqkv", config.qkv_rows, width, config)
    if config.qk_ln:
        # The original always makes LayerNorms of these two, whatever norm_type says, and normalises
        # all heads of a token together.
        shapes |= _norm("attn.q_ln", width, config, rms=False)
        shapes |= _norm("attn.k_ln", config.kv_dim, config, rms=False)
    shapes |= _linear("attn.out_proj", width, width, config)
    shapes |= _norm("norm_2", width, config, rms=config.is_rms)
    shapes |= _linear("ffn.up_proj", config.hidden_dim, width, config)
    shapes |= _linear("ffn.down_proj", width, config.hidden_dim, config)
    return shapes


def head_shapes(config: MPTConfig) -> dict[str, Shape]:
    """Return the shapes of the final norm and of whichever table unembeds."""
    table = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    shapes = _norm("transformer.norm_f", config.d_model, config, rms=config.is_rms)
    return shapes | {table: (config.vocab_size, config.d_model)}


def _norm(name: str, width: int, config: MPTConfig, *, rms: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (width,)}
    if not (config.no_bias or rms):
        shapes[f"{name}.bias"] = (width,)
    return shapes


def _linear(name: str, rows: int, columns: int, config: MPTConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    if not config.no_bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes
