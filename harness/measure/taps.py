"""Which taps a config promises, and their shapes: derived from the config alone.

The comparison loop is never asked what it should have compared; this module is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

BLOCK_PREFIX = "transformer.blocks"


class Sizes(Protocol):
    """The config fields that decide which taps there are and how wide."""

    @property
    def d_model(self) -> int:
        """Width of the stream."""

    @property
    def n_heads(self) -> int:
        """Query heads."""

    @property
    def n_layers(self) -> int:
        """Blocks."""

    @property
    def kv_n_heads(self) -> int:
        """Key/value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def qk_ln(self) -> bool:
        """Whether queries and keys are normalised."""

    @property
    def has_wpe(self) -> bool:
        """Whether positions are learned."""


@dataclass(frozen=True)
class Place:
    """A tap: layer (``None`` outside the blocks) and name relative to it."""

    layer: int | None
    tap: str

    @property
    def path(self) -> str:
        """Module path in the original checkpoint, for example ``transformer.blocks.3.norm_1``."""
        return self.tap if self.layer is None else f"{BLOCK_PREFIX}.{self.layer}.{self.tap}"


def block_widths(sizes: Sizes) -> Mapping[str, int]:
    """Return the taps of one block in order of evaluation, with their widths."""
    kv_width = sizes.kv_n_heads * sizes.head_dim
    widths = {"norm_1": sizes.d_model, "attn.Wqkv": sizes.d_model + 2 * kv_width}
    if sizes.qk_ln:
        widths |= {"attn.q_ln": sizes.d_model, "attn.k_ln": kv_width}
    return widths | {
        "attn.context": sizes.d_model,
        "attn.out_proj": sizes.d_model,
        "attn.residual": sizes.d_model,
        "norm_2": sizes.d_model,
        "ffn.up_proj": sizes.hidden_dim,
        "ffn.act": sizes.hidden_dim,
        "ffn.down_proj": sizes.d_model,
        "output": sizes.d_model,
    }


def embed_widths(sizes: Sizes) -> Mapping[str, int]:
    """Return the taps of the embedding with their widths."""
    widths = {"transformer.wte": sizes.d_model}
    if sizes.has_wpe:
        widths["transformer.wpe"] = sizes.d_model
    return widths


def head_widths(sizes: Sizes) -> Mapping[str, int]:
    """Return the taps after the last block with their widths."""
    return {"transformer.norm_f": sizes.d_model, "logits": sizes.vocab_size}


def shapes(widths: Mapping[str, int], batch: int, length: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tap for a batch of sequences."""
    return {tap: (batch, length, width) for tap, width in widths.items()}


def places(sizes: Sizes, layers: tuple[int, ...] | None = None) -> tuple[Place, ...]:
    """Return every tap of a model in order of evaluation; ``alibi`` stands before the blocks.

    Parameters
    ----------
    layers
        Restrict to these layers; all if ``None``.
    """
    chosen = range(sizes.n_layers) if layers is None else layers
    result = [Place(None, tap) for tap in embed_widths(sizes)]
    result.append(Place(None, "alibi"))
    result += [Place(layer, tap) for layer in chosen for tap in block_widths(sizes)]
    result += [Place(None, tap) for tap in head_widths(sizes)]
    return tuple(result)
