"""ALiBi: attention falls off linearly with distance, at a fixed rate for each head."""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(n_heads: int, bias_max: float = 8) -> Tensor:
    """Return the rate of each head.

    With N the power of two at or above `n_heads`, the rates are ``2 ** -(i * bias_max / N)`` for
    i = 1..N. If `n_heads` is no power of two, every second one comes first (i = 2, 4, ...), then
    the rest (i = 1, 3, ...), cut off after `n_heads`.

    Parameters
    ----------
    n_heads
        Number of heads, at least 1.
    bias_max
        ``alibi_bias_max``: minus the binary logarithm of the smallest rate.

    Returns
    -------
    Tensor
        float64 of shape (n_heads,), in logits per token of distance.

    Notes
    -----
    Press, Smith and Lewis 2022, section 3; the interleaving is the rule of MPT's original code.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads: expected at least 1, found {n_heads}")
    steps = 1
    while steps < n_heads:
        steps *= 2
    order = range(1, steps + 1)
    if steps != n_heads:
        order = [*range(2, steps + 1, 2), *range(1, steps + 1, 2)]  # type: ignore[assignment]
    exponents = [i * bias_max / steps for i in order][:n_heads]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)


def distances(query_length: int, key_length: int, *, anchor: str = "query") -> Tensor:
    """Return the position of each key, counted from an anchor.

    Parameters
    ----------
    query_length, key_length
        Numbers of tokens; the queries are the last ones of the keys.
    anchor
        ``"query"``: from the query itself, so that distances are 0 at the diagonal and negative
        before it. ``"last_key"``: from the last key, as the original does; it differs by a constant
        per query, which no softmax sees except through rounding.

    Returns
    -------
    Tensor
        int64 of shape (query_length, key_length).
    """
    if not 0 < query_length <= key_length:
        expected = f"1 to {key_length} queries for {key_length} keys"
        raise ValueError(f"query_length: expected {expected}, found {query_length}")
    keys = torch.arange(key_length)
    if anchor == "last_key":
        return (keys - (key_length - 1)).expand(query_length, key_length)
    queries = torch.arange(key_length - query_length, key_length)
    return keys[None, :] - queries[:, None]


def bias(
    n_heads: int,
    bias_max: float,
    query_length: int,
    key_length: int,
    *,
    anchor: str = "query",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return what ALiBi adds to the scaled scores, without the causal mask.

    Returns
    -------
    Tensor
        `dtype` of shape (n_heads, query_length, key_length). The rates are rounded to `dtype`
        first and multiplied there, as an implementation in that precision would.
    """
    positions = distances(query_length, key_length, anchor=anchor).to(dtype)
    return slopes(n_heads, bias_max).to(dtype)[:, None, None] * positions


def bias_differences(table: Tensor) -> Tensor:
    """Return the steps of a bias along its key axis: all of it that a softmax can see.

    Parameters
    ----------
    table
        Of shape (..., query, key).

    Returns
    -------
    Tensor
        float64 of shape (..., query, key - 1): ``table[..., 1:] - table[..., :-1]``. For ALiBi
        every entry is the rate of the head; a constant added to a row leaves it as it is.
    """
    wide = table.to(torch.float64)
    return wide[..., 1:] - wide[..., :-1]
