"""The MPT configuration as its original `config.json` spells it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from relax_impl import fields
from relax_impl.fields import ConfigError

__all__ = ["ConfigError", "MPTConfig"]


@dataclasses.dataclass(frozen=True)
class MPTConfig:
    """Everything that shapes the forward pass, resolved from the original field names.

    `clip_qkv` is None when the original would not clip (0 counts as unset there), `logit_scale` is
    a number even where the file says ``inv_sqrt_d_model``, and `kv_n_heads` is the number of
    key/value heads whatever `attn_type` says. `unknown` lists fields nobody here knows.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: int | float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    no_bias: bool = False
    norm_type: str = "low_precision_layernorm"
    learned_pos_emb: bool = True
    attn_type: str = "multihead_attention"
    kv_n_heads: int = 16
    qk_ln: bool = False
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    alibi: bool = False
    alibi_bias_max: int | float = 8
    prefix_lm: bool = False
    attn_uses_sequence_id: bool = False
    logit_scale: float | None = None
    embedding_fraction: float = 1.0
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    torch_dtype: str | None = None
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MPTConfig:
        """Read a parsed `config.json`.

        Parameters
        ----------
        raw
            The file's object, with the original field names; what is missing takes the original's
            default. `raw` is never modified.

        Returns
        -------
        MPTConfig
            The resolved configuration.

        Raises
        ------
        ConfigError
            A field has a wrong type or value, or asks for something that is not implemented.
        """
        return cls(**fields.read(raw))

    @property
    def head_dim(self) -> int:
        """Features of one head, d_model / n_heads."""
        return self.d_model // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Features of all key (or value) heads together."""
        return self.kv_n_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP."""
        return int(self.d_model * self.expansion_ratio)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all query heads, then key heads, then value heads."""
        return self.d_model + 2 * self.kv_dim

    @property
    def scale(self) -> float:
        """What q.k is multiplied by before the softmax."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def has_wpe(self) -> bool:
        """Whether a learned position embedding exists; ALiBi takes its place whatever the flag."""
        return self.learned_pos_emb and not self.alibi

    @property
    def is_rmsnorm(self) -> bool:
        """Whether the block norms are RMS norms; `low_precision_` only matters under autocast."""
        return self.norm_type.endswith("rmsnorm")

    @property
    def norm_has_bias(self) -> bool:
        """Whether the block norms have a bias; RMS norms never do."""
        return not self.no_bias and not self.is_rmsnorm
