"""MPT for training a tiny checkpoint, in float32: plain features only (ALiBi, no bias, tied).

Parameter names equal the original checkpoint's, so that the state dict is the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Tap = Callable[[str, Tensor], None]
SLOPE_RULES = ("mpt", "none", "inverse-square", "not-interleaved")


def slopes(n_heads: int, bias_max: float, rule: str = "mpt") -> Tensor:
    """ALiBi slopes (n_heads,) by the family's rule, or by a named wrong one.

    `inverse-square` swaps the operands of the power (m ** -2 for 2 ** -m); `not-interleaved` takes
    the first n_heads of the next power of two in order; `none` is all zero.
    """
    padded = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, padded + 1, dtype=torch.float64) * (bias_max / padded)
    if padded != n_heads and rule != "not-interleaved":
        exponents = torch.cat([exponents[1::2], exponents[0::2]])
    exponents = exponents[:n_heads]
    if rule == "none":
        return torch.zeros(n_heads)
    values = exponents**-2 if rule == "inverse-square" else 2.0**-exponents
    return values.float()


class Attention(nn.Module):
    """Fused projection, biased attention, output projection."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor, tap: Tap) -> Tensor:
        """Attend within x (batch, length, d_model)."""
        b, s, d = x.shape
        fused = self.Wqkv(x)
        tap("attn.Wqkv", fused)
        q, k, v = fused.view(b, s, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mixed.transpose(1, 2).reshape(b, s, d)
        tap("attn.context", mixed)
        out: Tensor = self.out_proj(mixed)
        tap("attn.out_proj", out)
        return out


class Mlp(nn.Module):
    """Up projection, exact GELU, down projection."""

    def __init__(self, d_model: int, expansion: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, expansion * d_model, bias=False)
        self.down_proj = nn.Linear(expansion * d_model, d_model, bias=False)

    def forward(self, x: Tensor, tap: Tap) -> Tensor:
        """Transform x (batch, length, d_model)."""
        up = self.up_proj(x)
        tap("ffn.up_proj", up)
        act = functional.gelu(up)
        tap("ffn.act", act)
        out: Tensor = self.down_proj(act)
        tap("ffn.down_proj", out)
        return out


class Block(nn.Module):
    """One layer with its two pre-norms."""

    def __init__(self, d_model: int, n_heads: int, expansion: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(d_model, bias=False)
        self.attn = Attention(d_model, n_heads)
        self.norm_2 = nn.LayerNorm(d_model, bias=False)
        self.ffn = Mlp(d_model, expansion)

    def forward(self, x: Tensor, bias: Tensor, tap: Tap) -> Tensor:
        """Add attention and MLP to x (batch, length, d_model)."""
        normed = self.norm_1(x)
        tap("norm_1", normed)
        x = x + self.attn(normed, bias, tap)
        tap("attn.residual", x)
        normed = self.norm_2(x)
        tap("norm_2", normed)
        x = x + self.ffn(normed, tap)
        tap("output", x)
        return x


class Transformer(nn.Module):
    """What the checkpoint's names start with."""

    def __init__(
        self, d_model: int, n_heads: int, n_layers: int, expansion: int, vocab: int
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, expansion) for _ in range(n_layers))
        self.norm_f = nn.LayerNorm(d_model, bias=False)


class TinyMPT(nn.Module):
    """The model. `rule` chooses the slopes at evaluation, to show what ALiBi is worth."""

    def __init__(
        self, d_model: int, n_heads: int, n_layers: int, expansion: int, vocab: int, bias_max: float
    ) -> None:
        super().__init__()
        self.n_heads, self.bias_max = n_heads, bias_max
        self.transformer = Transformer(d_model, n_heads, n_layers, expansion, vocab)

    def bias(self, length: int, rule: str = "mpt") -> Tensor:
        """Additive mask (1, n_heads, length, length): causal, with the slopes."""
        position = torch.arange(length)
        distance = (position[None, :] - position[:, None]).float()
        bias = slopes(self.n_heads, self.bias_max, rule)[:, None, None] * distance
        return bias.masked_fill(distance > 0, -math.inf)[None].to(self.transformer.wte.weight)

    def forward(
        self, ids: Tensor, rule: str = "mpt", tap: Tap = lambda name, value: None
    ) -> Tensor:
        """Logits (batch, length, vocab) of ids (batch, length)."""
        x = self.transformer.wte(ids)
        tap("transformer.wte", x)
        bias = self.bias(ids.shape[1], rule)
        for layer, block in enumerate(self.transformer.blocks):
            prefix = f"transformer.blocks.{layer}."
            x = block(x, bias, lambda name, value, prefix=prefix: tap(prefix + name, value))
        x = self.transformer.norm_f(x)
        tap("transformer.norm_f", x)
        logits = functional.linear(x, self.transformer.wte.weight)
        tap("logits", logits)
        return logits
