"""Causal attention with ALiBi, a few heads and queries at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference import alibi, original
from reference.arithmetic import DTYPES, compute_dtype, product, rounded, sum_last
from reference.config import MPTConfig
from reference.orders import Order

SCORES_AT_A_TIME = 1 << 24
LOG2_E = math.log2(math.e)


def attend(
    config: MPTConfig,
    order: Order,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Sequence[int] | None = None,
) -> Tensor:
    """Attend causally from the last tokens to all tokens.

    Parameters
    ----------
    config
        Heads, scale and ALiBi.
    order
        Rounding and grouping. Only ``(heads, queries, keys)`` pieces of `SCORES_AT_A_TIME` scores
        exist at once, except in a native order.
    q
        (batch, queries, n_heads, head_dim), after clip and norm; the last `queries` of the keys.
    k, v
        (batch, keys, kv_n_heads, head_dim).
    chosen
        The heads that `q` holds, where it does not hold all.

    Returns
    -------
    Tensor
        (batch, queries, n_heads * head_dim) in the compute type, rounded to storage; of the chosen
        heads where some are.

    Raises
    ------
    ValueError
        If a shape does not fit the config, or heads are chosen in a native order.
    """
    present = list(range(config.n_heads)) if chosen is None else list(chosen)
    _check(config, q, k, v, len(present))
    if order.native:
        if chosen is not None:
            raise ValueError("chosen: a native order evaluates all heads")
        return original.attend(config, order, q, k, v)
    q, k, v = (t.to(compute_dtype(order)).transpose(1, 2) for t in (q, k, v))
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    held = torch.tensor(present, device=q.device)
    shared_by = held // (config.n_heads // k.shape[1])
    slopes = alibi.slopes(config.n_heads, config.alibi_bias_max).to(q) if config.alibi else None
    result = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    for head, piece in _pieces(batch, heads, queries, keys):
        plan = _Piece(
            order=order,
            scale=config.scale,
            rates=None if slopes is None else slopes[held[head]],
            first=keys - queries + piece.start,
            total=keys,
            anchor=_anchor(config, order, keys),
            q=q[:, head, piece],
            k=k[:, shared_by[head]],
            v=v[:, shared_by[head]],
        )
        result[:, piece, head] = rounded(plan.context(), order).transpose(1, 2)
    return result.reshape(batch, queries, heads * width)


def _anchor(config: MPTConfig, order: Order, keys: int) -> int | None:
    """Return the position that distances are counted from; None counts from each query."""
    if order.anchor == "query":
        return None
    return max(config.max_seq_len, keys) - 1 if order.anchor == "table" else keys - 1


def _check(config: MPTConfig, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    width = config.head_dim
    expected_q = (q.shape[0], q.shape[1], heads, width)
    expected_k = (q.shape[0], k.shape[1], config.kv_n_heads, width)
    wanted = {"q": (q, expected_q), "k": (k, expected_k), "v": (v, expected_k)}
    for name, (tensor, expected) in wanted.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, found {tuple(tensor.shape)}")
    if not 0 < q.shape[1] <= k.shape[1]:
        raise ValueError(f"q: expected 1 to {k.shape[1]} queries, found {q.shape[1]}")


def _pieces(batch: int, heads: int, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    tall = max(1, min(queries, SCORES_AT_A_TIME // (batch * keys)))
    group = max(1, SCORES_AT_A_TIME // (batch * keys * tall))
    for head in range(0, heads, group):
        for start in range(0, queries, tall):
            stop = min(queries, start + tall)
            yield slice(head, min(heads, head + group)), slice(start, stop)


@dataclass(frozen=True)
class _Piece:
    """Some queries of some heads: q (b, h, c, D) from position `first`; k, v (b, h, keys, D)."""

    order: Order
    scale: float
    rates: Tensor | None
    first: int
    total: int
    anchor: int | None
    q: Tensor
    k: Tensor
    v: Tensor

    def context(self) -> Tensor:
        """Return the context (b, h, c, D), unrounded."""
        return self._online() if self.order.softmax.kind == "online" else self._whole()

    @property
    def _rounds_scores(self) -> bool:
        return self.order.storage is not None and self.order.scores == "storage"

    def _scores(self, start: int, stop: int, floor: float) -> Tensor:
        """Return what the softmax sees of keys start..stop-1, the future ones at `floor`."""
        order = self.order
        keys = self.k[:, :, start:stop].transpose(-1, -2)
        if self._rounds_scores:
            scores = rounded(rounded(product(self.q, keys, order), order) * self.scale, order)
        elif order.scale_on == "queries":
            scores = product(self.q * self.scale, keys, order)
        else:
            scores = product(self.q, keys, order) * self.scale
        key = torch.arange(start, stop, device=self.q.device)
        query = torch.arange(self.first, self.first + self.q.shape[2], device=self.q.device)
        away = key[None, :] - query[:, None]
        if self.rates is not None:
            counted = away if self.anchor is None else (key - self.anchor)[None, :]
            scores = scores + self.rates[:, None, None] * counted.to(scores.dtype)
        return scores.masked_fill(away > 0, floor)

    def _round_probabilities(self, p: Tensor) -> Tensor:
        return rounded(p, self.order) if self.order.probabilities == "storage" else p

    def _exp(self, x: Tensor) -> Tensor:
        if self.order.softmax.base == "e":
            return torch.exp(x)
        return torch.exp2(x * torch.tensor(LOG2_E, dtype=x.dtype, device=x.device))

    def _whole(self) -> Tensor:
        order = self.order
        if self._rounds_scores:
            # The original masks with the most negative number of the storage type. Where scores
            # overflow, that is not the smallest one, and the future leaks: keep that, and see all.
            stop, floor = self.total, torch.finfo(DTYPES[str(order.storage)]).min
        else:
            stop, floor = self.first + self.q.shape[2], float("-inf")
        scores = self._scores(0, stop, floor)
        if order.sum.kind == "whole" and order.softmax.base == "e":
            p = torch.softmax(scores, dim=-1)
        else:
            p = self._exp(scores - scores.amax(dim=-1, keepdim=True))
            p = p / sum_last(p, order)
        return product(self._round_probabilities(p), self.v[:, :, :stop], order)

    def _online(self) -> Tensor:
        """Running maximum, sum and context over blocks of keys (Milakov and Gimelshein 2018)."""
        order = self.order
        context = torch.zeros_like(self.q)
        maximum = torch.full_like(self.q[..., :1], float("-inf"))
        total = torch.zeros_like(maximum)
        end = self.first + self.q.shape[2]
        for start in range(0, end, order.softmax.block):
            stop = min(end, start + order.softmax.block)
            scores = self._scores(start, stop, float("-inf"))
            higher = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
            shrink = self._exp(maximum - higher)
            p = self._exp(scores - higher)
            total = total * shrink + p.sum(dim=-1, keepdim=True)
            part = product(self._round_probabilities(p), self.v[:, :, start:stop], order)
            context = context * shrink + part
            maximum = higher
        return context / total
