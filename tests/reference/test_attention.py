"""Attention against a loop over single queries, and what must and must not influence it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.alibi import slopes
from reference.config import MPTConfig
from reference.model import attend
from reference.orders import (
    GOLDEN,
    ORIGINAL,
    Order,
    Softmax,
    held_out_orders,
    legitimate_orders,
)

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
HEADS, WIDTH = 6, 8


def config(shared: int = HEADS, **attention: Any) -> MPTConfig:
    kinds = {HEADS: "multihead_attention", 1: "multiquery_attention"}
    fields: dict[str, Any] = {"attn_type": kinds.get(shared, "grouped_query_attention")}
    if shared not in kinds:
        fields["kv_n_heads"] = shared
    return MPTConfig.from_dict(
        {
            "d_model": HEADS * WIDTH,
            "n_heads": HEADS,
            "attn_config": {"alibi": True} | fields | attention,
        }
    )


def tensors(
    queries: int = 9, keys: int = 13, shared: int = HEADS, size: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, HEADS, WIDTH, generator=random) * size
    k = torch.randn(2, keys, shared, WIDTH, generator=random) * size
    return q, k, torch.randn(2, keys, shared, WIDTH, generator=random)


def by_hand(made: MPTConfig, q: Any, k: Any, v: Any) -> np.ndarray:
    """One query at a time, in long double."""
    q, k, v = (t.numpy().astype(np.longdouble) for t in (q, k, v))
    rates = slopes(HEADS, made.alibi_bias_max).numpy() * made.alibi
    context = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        at = k.shape[1] - q.shape[1] + i
        shared = h // (HEADS // k.shape[2])
        scores = k[b, : at + 1, shared] @ q[b, i, h] * made.scale
        scores = scores - rates[h] * (at - np.arange(at + 1))
        p = np.exp(scores - scores.max())
        context[b, i, h] = p / p.sum() @ v[b, : at + 1, shared]
    return context.reshape(*q.shape[:2], -1)


def limit(made: MPTConfig, q: Any, k: Any, v: Any, u: float) -> float:
    """Bound the error of attention in precision `u`, to first order.

    A score errs by (D + 3) u |q| |k| scale for its product and scaling, and by u times what ALiBi
    adds (at most the number of keys) for each of bias, sum and subtraction of the maximum. An error
    of d in every score changes a probability by at most 2 d relatively; exponentials, sum over the
    keys, division and the online rescaling add 2 keys + 8 roundings; the weighted sum another
    `keys`. A context is a mean of values, so that all this is relative to the largest value.
    """
    keys = k.shape[1]
    largest = float((q.norm(dim=-1).max() * k.norm(dim=-1).max()) * abs(made.scale))
    score = (WIDTH + 3) * largest + 4 * (keys + largest)
    return u * (2 * score + 3 * keys + 8) * float(v.abs().max())


CONFIGS = [
    {},
    {"alibi": False},
    {"alibi_bias_max": 16},
    {"softmax_scale": 0.7},
    {"softmax_scale": 0.0},
    {"shared": 1},
    {"shared": 2},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_golden_is_a_loop_over_queries(fields: dict[str, Any]) -> None:
    made = config(**fields)
    q, k, v = tensors(shared=made.kv_n_heads)
    error = np.abs(attend(made, GOLDEN, q, k, v).numpy() - by_hand(made, q, k, v)).max()
    assert error <= limit(made, q, k, v, UNIT["float64"])


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_every_order_is_golden_within_the_bound(fields: dict[str, Any]) -> None:
    made = config(**fields)
    q, k, v = tensors(keys=70, queries=68, shared=made.kv_n_heads)
    golden = attend(made, GOLDEN, q, k, v)
    for order in (*legitimate_orders("float32"), *held_out_orders("float32"), ORIGINAL("float32")):
        found = attend(made, order, q, k, v).double()
        assert (found - golden).abs().max() <= limit(made, q, k, v, UNIT["float32"]), order.name


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("scores", ["storage", "float32"])
def test_low_precision_orders_keep_their_bound(storage: Any, scores: Any) -> None:
    made = config()
    q, k, v = (t.to(getattr(torch, storage)) for t in tensors())
    golden = attend(made, GOLDEN, q, k, v)
    wide = [t.float() for t in (q, k, v)]
    for order in (*legitimate_orders(storage, scores=scores), ORIGINAL(storage)):
        found = attend(made, order, q, k, v).double()
        assert (found - golden).abs().max() <= limit(made, *wide, UNIT[storage]), order.name
        rounded = found.to(getattr(torch, storage)).double()
        assert torch.equal(found, rounded)


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**31))
def test_shared_heads_are_repeated_ones(shared: int, queries: int, past: int, seed: int) -> None:
    q, k, v = tensors(queries, queries + past, shared, seed=seed)
    repeats = HEADS // shared
    many = [t.repeat_interleave(repeats, dim=2) for t in (k, v)]
    few = attend(config(shared), GOLDEN, q, k, v)
    error = (few - attend(config(), GOLDEN, q, *many)).abs().max()
    assert error <= 2 * limit(config(shared), q, k, v, UNIT["float64"])


@pytest.mark.parametrize("order", [GOLDEN, *legitimate_orders("float16"), ORIGINAL("float16")])
def test_the_future_has_no_influence(order: Order) -> None:
    made = config()
    q, k, v = tensors(13, 13)
    before = attend(made, order, q, k, v)
    k[:, 7:] += 1
    v[:, 7:] -= 1
    after = attend(made, order, q, k, v)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


@pytest.mark.parametrize("order", [GOLDEN, *legitimate_orders("float32"), ORIGINAL("float32")])
def test_last_queries_are_those_of_the_whole(order: Order) -> None:
    made = config()
    q, k, v = tensors(13, 13)
    whole = attend(made, order, q, k, v)[:, -4:]
    part = attend(made, order, q[:, -4:], k, v)
    unit = UNIT["float64" if order is GOLDEN else "float32"]
    assert (whole - part).abs().max() <= 2 * limit(made, q, k, v, unit)


@pytest.mark.parametrize("budget", [1, 40, 200])
def test_pieces_make_the_whole(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(2)
    q, k, v = tensors(shared=2)
    for order in (GOLDEN, replace(GOLDEN, softmax=Softmax("online", 5))):
        whole = attend(made, order, q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr("reference.attention.SCORES_AT_A_TIME", budget)
            pieces = attend(made, order, q, k, v)
        assert (whole - pieces).abs().max() <= 2 * limit(made, q, k, v, UNIT["float64"])


def test_long_sequences_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.attention.SCORES_AT_A_TIME", 1000)
    largest = 0
    plain = torch.softmax

    def watched(scores: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return plain(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    attend(config(), GOLDEN, *tensors(60, 60))
    assert 0 < largest <= 1000


def test_rounded_scores_overflow_where_float32_scores_do_not() -> None:
    made = config()
    q, k, v = tensors(size=120.0)
    assert (q.abs().max() * k.abs().max() * WIDTH) > 65504
    for order in legitimate_orders("float16"):
        assert torch.isnan(attend(made, order, q, k, v)).any(), order.name
    for order in legitimate_orders("float16", scores="float32"):
        assert torch.isfinite(attend(made, order, q, k, v)).all(), order.name


@pytest.mark.parametrize(
    "order", [*legitimate_orders("float16"), ORIGINAL("float16")], ids=lambda order: order.name
)
def test_scores_that_overflow_downwards_let_the_future_in_as_in_the_original(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config()
    # One query at a time must still see all of the future.
    monkeypatch.setattr("reference.attention.SCORES_AT_A_TIME", 10)
    q, k, v = tensors(5, 5)
    context = attend(made, order, torch.full_like(q, 240), torch.full_like(k, -240), v)
    # All of the past is minus infinity; the mask is -65504, which is more.
    assert torch.isnan(context[:, -1]).all()
    if order.softmax.kind == "online":
        assert torch.isnan(context).all()
        return
    mean = v[:, 1:].half().double().mean(1).flatten(1)
    # The mean of four: probabilities are exact, and the sum and the result round.
    assert ((context[:, 0] - mean).abs() <= 2 * UNIT["float16"] * 4).all()


def test_scores_round_twice_and_before_the_bias() -> None:
    made = config()
    q, k, v = (t.half() for t in tensors(9, 9, size=3.0))
    exact = legitimate_orders("float16")[-1]
    assert exact.compute == "float64"
    found = attend(made, exact, q, k, v)
    raw = np.einsum("bqhd,bkhd->bhqk", q.double().numpy(), k.double().numpy())
    scores = (raw.astype(np.float16).astype(np.float64) * made.scale).astype(np.float16)
    away = np.arange(9)[None, :] - np.arange(9)[:, None]
    biased = scores.astype(np.float64) + slopes(HEADS).numpy()[:, None, None] * away
    p = torch.softmax(torch.from_numpy(np.where(away > 0, -np.inf, biased)), -1).half().double()
    expected = torch.einsum("bhqk,bkhd->bqhd", p, v.double()).flatten(2).half().double()
    assert torch.equal(found, expected)


def test_counting_from_the_last_key_costs_precision_far_from_it() -> None:
    made = config()
    q, k, v = tensors(400, 400)
    golden = attend(made, GOLDEN, q, k, v)
    near = Order("near", storage="float32", scores="float32")
    cost = {
        anchor: (attend(made, replace(near, anchor=anchor), q, k, v) - golden).norm()  # type: ignore
        for anchor in ("query", "last_key")
    }
    assert cost["last_key"] > 2 * cost["query"] > 0


def errors(size: float, **declared: Any) -> list[float]:
    made = config()
    q, k, v = (t.half().float() for t in tensors(60, 60, size=size))
    golden = attend(made, GOLDEN, q, k, v)
    orders = legitimate_orders("float16", **declared)
    return [float((attend(made, o, q, k, v) - golden).norm()) for o in orders]


def test_rounded_scores_cost_more_where_scores_are_large() -> None:
    assert min(errors(6.0)) > max(errors(6.0, scores="float32"))


def test_unrounded_probabilities_cost_less() -> None:
    rounded = errors(1.0, scores="float32")
    unrounded = errors(1.0, scores="float32", probabilities="float32")
    assert all(a > b for a, b in zip(rounded, unrounded, strict=True))


def test_a_narrow_accumulator_costs_more() -> None:
    assert min(errors(1.0, accumulator="float16")) > max(errors(1.0))


def test_the_scale_follows_the_head_width() -> None:
    assert config().scale == 1 / math.sqrt(WIDTH)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_shape_is_named(which: int) -> None:
    arguments = list(tensors())
    arguments[which] = arguments[which][..., :-1]
    with pytest.raises(ValueError, match=r"^[qkv]: expected shape .*, found"):
        attend(config(), GOLDEN, *arguments)
    q, k, v = tensors(9, 8)
    with pytest.raises(ValueError, match="expected 1 to 8 queries, found 9"):
        attend(config(), GOLDEN, q, k, v)
