"""MPT as `nn.Module`s; parameters carry the names of the original checkpoint."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relax_impl.config import MPTConfig
from relax_impl.layout import Layout
from relax_impl.operations import Operations, Tap


def no_tap(name: str, value: Tensor) -> Tensor:
    """Pass the value on: the deployed model keeps no intermediate."""
    return value


class MPTLinear(nn.Module):
    """Weight [rows, columns] in some layout, with a bias or without."""

    def __init__(self, rows: int, columns: int, *, bias: bool, layout: Layout, dtype: str) -> None:
        self.rows, self.columns, self.layout = rows, columns, layout
        self.weight = nn.Parameter(layout.shape(rows, columns), dtype)
        self.bias = nn.Parameter((rows,), dtype) if bias else None

    def matrix(self) -> Tensor:
        """The weight as [rows, columns], whatever its layout."""
        return self.layout.restore(self.weight, self.rows, self.columns)


class MPTEmbedding(MPTLinear):
    """Table of [rows, columns]; the token table also unembeds."""

    def __init__(self, rows: int, columns: int, *, layout: Layout, dtype: str) -> None:
        super().__init__(rows, columns, bias=False, layout=layout, dtype=dtype)


class MPTNorm(nn.Module):
    """Gain and, for layer norms, possibly an offset."""

    def __init__(self, width: int, *, epsilon: float, is_rms: bool, bias: bool, dtype: str) -> None:
        self.epsilon, self.is_rms = epsilon, is_rms
        self.weight = nn.Parameter((width,), dtype)
        self.bias = nn.Parameter((width,), dtype) if bias else None


def block_norm(config: MPTConfig, dtype: str) -> MPTNorm:
    """The norm that norm_type asks for."""
    return MPTNorm(
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        is_rms=config.is_rmsnorm,
        bias=config.norm_has_bias,
        dtype=dtype,
    )


class MPTAttention(nn.Module):
    """Parameters of the attention."""

    def __init__(self, config: MPTConfig, layout: Layout, dtype: str) -> None:
        d, bias = config.d_model, not config.no_bias
        self.Wqkv = MPTLinear(config.qkv_rows, d, bias=bias, layout=layout, dtype=dtype)
        if config.qk_ln:
            # Always layer norms, over the full width: norm_type is not asked.
            eps = config.layer_norm_epsilon
            self.q_ln = MPTNorm(d, epsilon=eps, is_rms=False, bias=bias, dtype=dtype)
            self.k_ln = MPTNorm(config.kv_dim, epsilon=eps, is_rms=False, bias=bias, dtype=dtype)
        self.out_proj = MPTLinear(d, d, bias=bias, layout=layout, dtype=dtype)


class MPTMLP(nn.Module):
    """Parameters of the MLP."""

    def __init__(self, config: MPTConfig, layout: Layout, dtype: str) -> None:
        d, h, bias = config.d_model, config.hidden_dim, not config.no_bias
        self.up_proj = MPTLinear(h, d, bias=bias, layout=layout, dtype=dtype)
        self.down_proj = MPTLinear(d, h, bias=bias, layout=layout, dtype=dtype)


class MPTBlock(nn.Module):
    """One block."""

    def __init__(self, config: MPTConfig, layout: Layout, dtype: str) -> None:
        self.config = config
        self.norm_1 = block_norm(config, dtype)
        self.attn = MPTAttention(config, layout, dtype)
        self.norm_2 = block_norm(config, dtype)
        self.ffn = MPTMLP(config, layout, dtype)

    def forward(self, ops: Operations, hidden: Tensor, tap: Tap = no_tap) -> Tensor:
        """Stream (b, s, d) after this block."""
        return ops.block(ops, self, hidden, tap)


class MPTModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MPTConfig, layout: Layout, dtype: str, n_layers: int) -> None:
        d = config.d_model
        self.wte = MPTEmbedding(config.vocab_size, d, layout=layout, dtype=dtype)
        if config.has_wpe:
            self.wpe = MPTEmbedding(config.max_seq_len, d, layout=layout, dtype=dtype)
        self.blocks = nn.ModuleList([MPTBlock(config, layout, dtype) for _ in range(n_layers)])
        self.norm_f = block_norm(config, dtype)


class MPTForCausalLM(nn.Module):
    """The whole model.

    Parameters
    ----------
    config
        The model.
    layout
        Storage order of the matrices.
    dtype
        Storage dtype: float16, bfloat16 or float32.
    """

    def __init__(self, config: MPTConfig, layout: Layout, dtype: str) -> None:
        self.config = config
        self.transformer = MPTModel(config, layout, dtype, config.n_layers)
        if not config.tie_word_embeddings:
            self.lm_head = MPTEmbedding(
                config.vocab_size, config.d_model, layout=layout, dtype=dtype
            )

    def embed(self, ops: Operations, ids: Tensor, tap: Tap = no_tap) -> Tensor:
        """Stream (b, s, d) into block 0, from ids (b, s) int32."""
        transformer, config = self.transformer, self.config
        token = tap("transformer.wte", ops.embed(ids, transformer.wte))
        position = None
        if config.has_wpe:
            position = tap("transformer.wpe", ops.positions(ids, transformer.wpe))
        return tap("hidden", ops.mix(token, position, config.embedding_fraction))

    def head(self, ops: Operations, hidden: Tensor, tap: Tap = no_tap) -> Tensor:
        """Logits (b, s, vocab) float32 from the stream after the last block."""
        transformer, config = self.transformer, self.config
        table = transformer.wte if config.tie_word_embeddings else self.lm_head
        hidden = tap("transformer.norm_f", ops.norm(hidden, transformer.norm_f))
        return tap("logits", ops.unembed(hidden, table, config.logit_scale))
