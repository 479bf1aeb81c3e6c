"""A block as steps: which tap comes from which, alone and chained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reference.config import MPTConfig
from reference.model import (
    Reference,
    Step,
    block_steps,
    block_weights,
    embed,
    embed_step,
    embed_steps,
    embed_weights,
    head,
    head_step,
    head_steps,
    head_weights,
    run_block,
    run_step,
    tap_width,
)
from reference.orders import GOLDEN, ORIGINAL, Order, held_out_orders, legitimate_orders

EVERYTHING: dict[str, Any] = {
    "attention": {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
        "qk_ln": True,
        "clip_qkv": 1.5,
    },
    "no_bias": False,
    "expansion_ratio": 3,
    "logit_scale": 0.5,
}
ORDERS = [
    GOLDEN,
    *legitimate_orders("float16"),
    *held_out_orders("bfloat16", residual="fused", activation="fused"),
    ORIGINAL("float16"),
]
PLAIN_STEPS = [
    ("norm_1", ("input",)),
    ("attn.Wqkv", ("norm_1",)),
    ("attn.context", ("attn.Wqkv",)),
    ("attn.out_proj", ("attn.context",)),
    ("attn.residual", ("input", "attn.out_proj")),
    ("norm_2", ("attn.residual",)),
    ("ffn.up_proj", ("norm_2",)),
    ("ffn.act", ("ffn.up_proj",)),
    ("ffn.down_proj", ("ffn.act",)),
    ("output", ("attn.residual", "ffn.down_proj")),
]


def steps(config: MPTConfig, order: Order) -> list[tuple[str, tuple[str, ...]]]:
    return [(step.tap, step.inputs) for step in block_steps(config, order)]


@pytest.fixture(scope="session")
def config(raw: Callable[..., dict[str, Any]]) -> MPTConfig:
    return MPTConfig.from_dict(raw(**EVERYTHING))


@pytest.fixture(scope="session")
def arrays(raw: Callable[..., Any], checkpoint: Callable[..., Any]) -> dict[str, np.ndarray]:
    return checkpoint(raw(**EVERYTHING))


@pytest.fixture(scope="session")
def hidden() -> torch.Tensor:
    return torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0))


def test_the_plain_graph(raw: Callable[..., dict[str, Any]]) -> None:
    plain = MPTConfig.from_dict(raw())
    assert steps(plain, GOLDEN) == PLAIN_STEPS
    assert steps(plain, ORIGINAL("float16")) == PLAIN_STEPS


def test_norms_of_queries_and_keys_stand_between(config: MPTConfig) -> None:
    graph = dict(steps(config, GOLDEN))
    assert graph["attn.q_ln"] == graph["attn.k_ln"] == ("attn.Wqkv",)
    assert graph["attn.context"] == ("attn.Wqkv", "attn.q_ln", "attn.k_ln")
    assert len(graph) == len(PLAIN_STEPS) + 2


def test_fusing_changes_what_a_tap_is_judged_from(raw: Callable[..., dict[str, Any]]) -> None:
    plain = MPTConfig.from_dict(raw())
    changed = {
        "residual": {
            "attn.residual": ("input", "attn.context"),
            "output": ("attn.residual", "ffn.act"),
        },
        "activation": {"ffn.act": ("norm_2",)},
    }
    for field, expected in changed.items():
        order = replace(legitimate_orders("float16")[0], **{field: "fused"})
        assert dict(steps(plain, order)) == dict(PLAIN_STEPS) | expected


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_steps_chained_from_their_named_inputs_alone_are_the_block(
    order: Order, config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 1, arrays.__getitem__)
    block = run_block(config, order, weights, hidden)
    assert list(block) == [step.tap for step in block_steps(config, order)]
    known = block | {"input": hidden}
    for step in block_steps(config, order):
        inputs = {name: known[name] for name in step.inputs}
        value = run_step(config, order, weights, step.tap, inputs)
        assert torch.equal(value, block[step.tap]), step.tap
        assert value.shape == (2, 11, tap_width(config, step.tap))
        for name in inputs:
            less = {other: inputs[other] for other in inputs if other != name}
            with pytest.raises(ValueError, match=rf"{step.tap}: needs .*missing {name}"):
                run_step(config, order, weights, step.tap, less)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_every_input_of_a_step_matters(
    order: Order, config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 0, arrays.__getitem__)
    known = run_block(config, order, weights, hidden) | {"input": hidden}
    for step in block_steps(config, order):
        for name in step.inputs:
            random = torch.randn(known[name].shape, generator=torch.Generator().manual_seed(1))
            inputs = {n: known[n] for n in step.inputs} | {name: random}
            value = run_step(config, order, weights, step.tap, inputs)
            assert not torch.equal(value, known[step.tap]), (step.tap, name)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_every_tap_is_held_in_storage_and_golden_is_not(
    order: Order, config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 0, arrays.__getitem__)
    for tap, value in run_block(config, order, weights, hidden).items():
        assert value.dtype == (torch.float64 if order.compute == "float64" else torch.float32)
        narrow = getattr(torch, order.storage or "float32")
        held = torch.equal(value, value.to(narrow).to(value.dtype))
        assert held is (order.storage is not None), tap


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_the_exact_order_is_golden_rounded_where_it_rounds_once(
    storage: Any, config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    exact = next(o for o in legitimate_orders(storage) if o.compute == "float64")
    assert exact.norm.round_normalised is False
    weights = block_weights(config, 0, arrays.__getitem__, storage=storage)
    known = run_block(config, exact, weights, hidden) | {"input": hidden}
    once = [s for s in block_steps(config, exact) if s.tap != "attn.context"]
    for step in once:
        inputs = {name: known[name] for name in step.inputs}
        golden = run_step(config, GOLDEN, weights, step.tap, inputs)
        rounded = golden.to(getattr(torch, storage)).to(torch.float64)
        assert torch.equal(run_step(config, exact, weights, step.tap, inputs), rounded), step.tap


def test_a_fused_addition_or_activation_rounds_once(
    config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    exact = legitimate_orders("float16")[-1]
    assert exact.compute == "float64"
    fused = replace(exact, residual="fused", activation="fused")
    weights = block_weights(config, 0, arrays.__getitem__)
    known = run_block(config, exact, weights, hidden) | {"input": hidden.double()}
    up = run_step(config, GOLDEN, weights, "ffn.up_proj", known)
    out = run_step(config, GOLDEN, weights, "attn.out_proj", known)
    act = run_step(config, GOLDEN, weights, "ffn.act", {"ffn.up_proj": up})
    for tap, once in (("ffn.act", act), ("attn.residual", known["input"] + out)):
        value = run_step(config, fused, weights, tap, known)
        assert torch.equal(value, once.half().double())
        assert not torch.equal(value, known[tap])


def test_clip_bounds_the_fused_tap_and_norms_come_after_it(
    config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 0, arrays.__getitem__)
    block = run_block(config, GOLDEN, weights, hidden)
    assert block["attn.Wqkv"].abs().max() == 1.5
    assert block["attn.q_ln"].abs().max() > 1.5
    free = run_block(replace(config, clip_qkv=None), GOLDEN, weights, hidden)
    assert torch.equal(free["attn.Wqkv"].clamp(-1.5, 1.5), block["attn.Wqkv"])


def test_the_norm_of_queries_spans_all_heads(
    config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 0, arrays.__getitem__)
    fused = torch.zeros(1, 1, config.qkv_rows, dtype=torch.float64)
    fused[..., 0] = 1.0
    value = run_step(config, GOLDEN, weights, "attn.q_ln", {"attn.Wqkv": fused})
    # One feature of 48 is 1: mean 1/48, variance (1/48) (1 - 1/48).
    mean, variance = 1 / 48, (1 / 48) * (47 / 48)
    gamma, beta = (weights[f"attn.q_ln.{n}"].double() for n in ("weight", "bias"))
    centred = fused[0, 0, :48] - mean
    expected = centred / (variance + 1e-5) ** 0.5 * gamma + beta
    # Some ten roundings of numbers below 7 * gamma.
    assert (value[0, 0] - expected).abs().max() <= 10 * 7 * 2.0**-53 * gamma.abs().max()


def test_the_wrong_tap_or_width_is_named(
    config: MPTConfig, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    weights = block_weights(config, 0, arrays.__getitem__)
    with pytest.raises(ValueError, match=r"tap: expected one of norm_1, .*, found 'norm_3'"):
        run_step(config, GOLDEN, weights, "norm_3", {"input": hidden})
    with pytest.raises(ValueError, match=r"norm_1: expected input of shape \(b, s, 48\)"):
        run_step(config, GOLDEN, weights, "norm_1", {"input": hidden[..., :-1]})
    with pytest.raises(ValueError, match=r"norm_1: expected input of shape"):
        run_step(config, GOLDEN, weights, "norm_1", {"input": hidden[0]})


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_steps_too(
    order: Order,
    tied: bool,
    raw: Callable[..., Any],
    checkpoint: Callable[..., Any],
    ids: torch.Tensor,
) -> None:
    made = raw({"alibi": False}, tie_word_embeddings=tied, embedding_fraction=0.25, logit_scale=0.3)
    config, arrays = MPTConfig.from_dict(made), checkpoint(made)
    first = embed(config, order, embed_weights(config, arrays.__getitem__), ids)
    assert [step.tap for step in embed_steps(config)] == list(first)
    assert embed_steps(config)[-1] == Step("hidden", ("transformer.wte", "transformer.wpe"))
    assert torch.equal(embed_step(config, order, "hidden", first), first["hidden"])
    table = torch.from_numpy(arrays["transformer.wpe.weight"])[:24].to(first["hidden"].dtype)
    if order.storage is None:
        assert torch.equal(first["transformer.wpe"], table.expand(2, 24, 48))
    weights = head_weights(config, arrays.__getitem__)
    last = head(config, order, weights, first["hidden"])
    assert [step.tap for step in head_steps(config, order)] == list(last)
    known = last | {"hidden": first["hidden"]}
    for step in head_steps(config, order):
        inputs = {name: known[name] for name in step.inputs}
        assert torch.equal(head_step(config, order, weights, step.tap, inputs), last[step.tap])
        with pytest.raises(ValueError, match="missing"):
            head_step(config, order, weights, step.tap, {})


def test_a_scale_of_the_logits_is_one_rounding_or_two_and_may_be_zero(
    raw: Callable[..., Any], checkpoint: Callable[..., Any], hidden: torch.Tensor
) -> None:
    made = raw(logit_scale=0.3)
    config = MPTConfig.from_dict(made)
    weights = head_weights(config, checkpoint(made).__getitem__, storage="float16")
    norm_f = {"transformer.norm_f": hidden.half()}
    exact = legitimate_orders("float16")[-1]
    assert (exact.compute, exact.epilogue) == ("float64", "fused")
    golden = hidden.half().double() @ weights["transformer.wte.weight"].double().T
    once = head_step(config, exact, weights, "logits", norm_f)
    assert torch.equal(once, (golden * 0.3).half().double())
    twice = head_step(config, replace(exact, epilogue="separate"), weights, "logits", norm_f)
    assert torch.equal(twice, (golden.half().double() * 0.3).half().double())
    assert not torch.equal(once, twice)
    nothing = replace(config, logit_scale=0.0)
    for order in (exact, GOLDEN, ORIGINAL("float16")):
        assert (head_step(nothing, order, weights, "logits", norm_f) == 0).all()


def test_ids_are_checked(
    raw: Callable[..., Any], checkpoint: Callable[..., Any], ids: torch.Tensor
) -> None:
    made = raw({"alibi": False})
    model = Reference(made, checkpoint(made).__getitem__)
    for wrong, message in (
        (ids - 61, "expected 0 to 60"),
        (ids + 61, "expected 0 to 60"),
        (ids[0], "expected shape"),
        (ids[:, :0], "expected shape"),
        (torch.zeros(1, 65, dtype=torch.long), "at most max_seq_len 64"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(wrong)
