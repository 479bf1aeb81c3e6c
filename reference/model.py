"""MPT, block by block: the public face of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from reference import alibi
from reference.arithmetic import compute_dtype
from reference.attention import attend
from reference.config import MPTConfig
from reference.ends import embed, embed_step, embed_steps, head, head_step, head_steps
from reference.orders import ORIGINAL, Order, StorageName
from reference.steps import INPUT, Step, Weights, block_steps, run_step, tap_width
from reference.weights import (
    BlockWeights,
    Read,
    as_tensor,
    block_weights,
    embed_weights,
    head_weights,
)

Ids: TypeAlias = Tensor | np.ndarray[tuple[int, ...], np.dtype[np.integer]]

__all__ = [
    "BlockWeights",
    "Reference",
    "Step",
    "as_tensor",
    "attend",
    "block_steps",
    "block_weights",
    "embed",
    "embed_step",
    "embed_steps",
    "embed_weights",
    "head",
    "head_step",
    "head_steps",
    "head_weights",
    "run_block",
    "run_step",
    "tap_width",
]


def run_block(
    config: MPTConfig, order: Order, weights: Weights, hidden: Tensor
) -> dict[str, Tensor]:
    """Run one block.

    Parameters
    ----------
    config, order, weights
        What to compute, how, and with which tensors of the block.
    hidden
        The stream into the block, (batch, sequence, d_model) in any type.

    Returns
    -------
    dict
        Every tap of `block_steps`, in the compute type, rounded to storage.
    """
    taps: dict[str, Tensor] = {INPUT: hidden.to(compute_dtype(order))}
    for step in block_steps(config, order):
        taps[step.tap] = run_step(config, order, weights, step.tap, taps)
    del taps[INPUT]
    return taps


class Reference:
    """A whole model that keeps its weights in the storage type and is called part by part.

    Parameters
    ----------
    config
        The model, or its parsed config.json.
    read
        Original tensor name to array. Called when a part is first used.
    storage
        Precision of the weights and of what comes back.
    order
        How to evaluate; the original's own order by default.
    device
        Where torch computes.
    keep
        Keep the weights of every part that was used, not of the last one alone.
    """

    def __init__(
        self,
        config: MPTConfig | Mapping[str, object],
        read: Read,
        *,
        storage: StorageName = "float32",
        order: Order | None = None,
        device: str = "cpu",
        keep: bool = True,
    ) -> None:
        self.config = config if isinstance(config, MPTConfig) else MPTConfig.from_dict(config)
        self.read = read
        self.storage = storage
        self.order = ORIGINAL(storage) if order is None else order
        self.device = device
        self.keep = keep
        self._parts: dict[str, BlockWeights] = {}

    def weights(self, part: int | str) -> BlockWeights:
        """Return the tensors of a layer, or of ``"embed"`` or ``"head"``, and keep them."""
        key = str(part)
        if key not in self._parts:
            if not self.keep:
                self._parts.clear()
            self._parts[key] = self._load(part)
        return self._parts[key]

    def _load(self, part: int | str) -> BlockWeights:
        if isinstance(part, int):
            return block_weights(
                self.config, part, self.read, storage=self.storage, device=self.device
            )
        load = embed_weights if part == "embed" else head_weights
        return load(self.config, self.read, storage=self.storage, device=self.device)

    def embed(self, ids: Ids) -> dict[str, Tensor]:
        """Return the taps of the embedding; ids (batch, sequence)."""
        return embed(self.config, self.order, self.weights("embed"), self._ids(ids))

    def block(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Return every tap of one block from a given stream (batch, sequence, d_model)."""
        return run_block(self.config, self.order, self.weights(layer), hidden.to(self.device))

    def head(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return ``transformer.norm_f`` and ``logits`` from a given stream."""
        return head(self.config, self.order, self.weights("head"), hidden.to(self.device))

    def forward(self, ids: Ids) -> Tensor:
        """Return the logits (batch, sequence, vocab_size)."""
        hidden = self.embed(ids)["hidden"]
        for layer in range(self.config.n_layers):
            hidden = self.block(layer, hidden)["output"]
        return self.head(hidden)["logits"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the context of given queries, keys and values: see `attend`."""
        return attend(self.config, self.order, q, k, v)

    def attention_bias(self, query_length: int, key_length: int) -> Tensor:
        """Return what is added to the scores, float64 (n_heads, query, key), zero without ALiBi."""
        config = self.config
        if not config.alibi:
            return torch.zeros(config.n_heads, query_length, key_length, dtype=torch.float64)
        return alibi.bias(config.n_heads, config.alibi_bias_max, query_length, key_length)

    def _ids(self, ids: Ids) -> Tensor:
        tensor = ids if isinstance(ids, Tensor) else torch.from_numpy(np.array(ids))
        return tensor.to(self.device)
