"""Faults of the fused projection's rows: which of them are query, key and value of which head."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.faults.model import Fault
from harness.faults.weights import Change, changed, fault, tiled

_NEOX = "https://github.com/OpenNMT/CTranslate2 (GPTNeoXLoader splits Wqkv per head)"


def _qkv(array: Any, config: Any) -> tuple[Any, Any, Any]:
    d, kv = config.d_model, config.kv_dim
    return array[:d], array[d : d + kv], array[d + kv :]


def _per_head(array: Any, config: Any) -> Any:
    """Read rows that are q, k, v as if they were [head][q, k, v]."""
    heads, dim = config.n_heads, config.head_dim
    return array.reshape(heads, 3, dim, -1).swapaxes(0, 1).reshape(array.shape)


def _per_channel(array: Any, config: Any) -> Any:
    """Read rows that are q, k, v as if every channel had its q, k and v side by side."""
    return array.reshape(-1, 3, array.shape[1]).swapaxes(0, 1).reshape(array.shape)


def _order_of(*order: int) -> Change:
    return lambda array, config: np.concatenate([_qkv(array, config)[i] for i in order])


def _half_rotation(array: Any, config: Any) -> Any:
    """Permute the channels of every query and key head as for a rotary embedding; only of q."""
    q, k, v = _qkv(array, config)
    heads, dim = config.n_heads, config.head_dim
    q = q.reshape(heads, dim // 2, 2, -1).swapaxes(1, 2).reshape(q.shape)
    return np.concatenate([q, k, v])


def _swap_first_heads(part: int) -> Change:
    def change(array: Any, config: Any) -> Any:
        parts = list(_qkv(array, config))
        dim = config.head_dim
        moved = parts[part].copy()
        moved[:dim], moved[dim : 2 * dim] = parts[part][dim : 2 * dim], parts[part][:dim]
        parts[part] = moved
        return np.concatenate(parts)

    return change


def _raveled(array: Any, config: Any) -> Any:
    """Store a matrix column by column and read it row by row."""
    return np.ascontiguousarray(array.T).reshape(array.shape)


def _halves_exchanged(array: Any, config: Any) -> Any:
    return np.roll(array, array.shape[1] // 2, axis=1)


def _kv_by_head(array: Any, config: Any) -> Any:
    """Read key and value rows as if every key head had its key and value side by side."""
    q, k, v = _qkv(array, config)
    both = np.concatenate([k, v]).reshape(config.kv_n_heads, 2, config.head_dim, -1)
    return np.concatenate([q, both.swapaxes(0, 1).reshape(-1, array.shape[1])])


FAULTS: tuple[Fault, ...] = (
    fault(
        "wqkv-per-head",
        "attn.Wqkv",
        "Wqkv is split per head, as GPT-NeoX stores it",
        changed(_per_head, "attn.Wqkv.weight"),
        _NEOX,
    ),
    fault(
        "wqkv-per-channel",
        "attn.Wqkv",
        "Wqkv is split per channel",
        changed(_per_channel, "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-q-k-swapped",
        "attn.Wqkv",
        "query and key rows of Wqkv change places",
        changed(_order_of(1, 0, 2), "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-k-v-swapped",
        "attn.Wqkv",
        "key and value rows of Wqkv change places",
        changed(_order_of(0, 2, 1), "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-rotary-rows",
        "attn.Wqkv",
        "query rows are permuted as for a rotary embedding, key rows are not",
        changed(_half_rotation, "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-two-query-heads",
        "attn.Wqkv",
        "the first two query heads change places",
        changed(_swap_first_heads(0), "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-two-value-heads",
        "attn.Wqkv",
        "the first two value heads change places",
        changed(_swap_first_heads(2), "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-transposed-memory",
        "attn.Wqkv",
        "Wqkv is stored column by column and read row by row",
        changed(_raveled, "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-columns-rotated",
        "attn.Wqkv",
        "the two halves of the input features change places",
        changed(_halves_exchanged, "attn.Wqkv.weight"),
    ),
    fault(
        "wqkv-shard-zero-twice",
        "attn.Wqkv",
        "both halves of the rows come from the first tensor-parallel shard",
        changed(tiled, "attn.Wqkv.weight"),
        "https://github.com/BlackSamorez/tensor_parallel/issues/77",
    ),
    fault(
        "bias-q-k-swapped",
        "attn.Wqkv",
        "query and key parts of Wqkv's bias change places",
        changed(_order_of(1, 0, 2), "attn.Wqkv.bias"),
        exposure="biases",
    ),
    fault(
        "mqa-keys-values-swapped",
        "attn.Wqkv",
        "the one key head and the one value head change places",
        changed(_order_of(0, 2, 1), "attn.Wqkv.weight"),
        exposure="multi-query",
    ),
    fault(
        "gqa-keys-values-by-head",
        "attn.Wqkv",
        "key and value rows of grouped heads are read as [head][k, v]",
        changed(_kv_by_head, "attn.Wqkv.weight"),
        exposure="grouped-query",
    ),
)
