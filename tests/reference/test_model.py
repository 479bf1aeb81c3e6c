"""The whole model: against a plain forward written twice, and every field with an effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from reference.config import MPTConfig
from reference.model import Reference, as_tensor, block_weights
from reference.orders import (
    GOLDEN,
    ORIGINAL,
    Order,
    StorageName,
    held_out_orders,
    legitimate_orders,
)

Make = Callable[..., dict[str, Any]]
Arrays = Mapping[str, np.ndarray]
erf = np.vectorize(math.erf, otypes=[np.float64])


def forward(raw: Mapping[str, Any], w: Arrays, ids: np.ndarray) -> np.ndarray:
    """MPT in plain numpy float64, from the formulae: shares nothing with the reference.

    Only fields that `raw` holds explicitly are read, with the original's defaults in place.
    """
    attn = raw["attn_config"]
    d, heads = raw["d_model"], raw["n_heads"]
    width, epsilon = d // heads, raw.get("layer_norm_epsilon", 1e-5)
    rms = "rms" in raw.get("norm_type", "")
    shared = {"multiquery_attention": 1}.get(attn.get("attn_type"), attn.get("kv_n_heads", heads))
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def norm(x: np.ndarray, name: str, rms: bool = False) -> np.ndarray:
        x = x if rms else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rate(head: int) -> float:
        steps = 1 << (heads - 1).bit_length()
        i = head + 1 if steps == heads else (2 * head + 2 if 2 * head + 2 <= steps else 0)
        i = i or 2 * (head - steps // 2) + 1
        return 2.0 ** (-i * attn.get("alibi_bias_max", 8) / steps)

    x = w["transformer.wte.weight"][ids]
    if "transformer.wpe.weight" in w:
        x = x + w["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(raw["n_layers"]):
        at = f"transformer.blocks.{layer}."
        qkv = linear(norm(x, at + "norm_1", rms), at + "attn.Wqkv")
        if attn.get("clip_qkv"):
            qkv = np.clip(qkv, -attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = np.split(qkv, [d, d + shared * width], axis=-1)
        if attn.get("qk_ln"):
            q, k = norm(q, at + "attn.q_ln"), norm(k, at + "attn.k_ln")
        context = np.empty_like(q)
        length = ids.shape[1]
        away = np.arange(length)[None, :] - np.arange(length)[:, None]
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            group = head // (heads // shared)
            theirs = slice(group * width, (group + 1) * width)
            s = q[..., mine] @ k[..., theirs].swapaxes(-1, -2)
            scale = attn.get("softmax_scale")
            s = s * (1 / math.sqrt(width) if scale is None else scale)
            s = s + rate(head) * away * attn.get("alibi", False)
            p = np.exp(np.where(away > 0, -np.inf, s - s.max(-1, keepdims=True)))
            context[..., mine] = p / p.sum(-1, keepdims=True) @ v[..., theirs]
        x = x + linear(context, at + "attn.out_proj")
        up = linear(norm(x, at + "norm_2", rms), at + "ffn.up_proj")
        x = x + linear(0.5 * up * (1 + erf(up / math.sqrt(2))), at + "ffn.down_proj")
    x = norm(x, "transformer.norm_f", rms)
    logits = x @ w.get("lm_head.weight", w["transformer.wte.weight"]).T
    scale = raw.get("logit_scale")
    return logits * (
        1 / math.sqrt(d) if scale == "inv_sqrt_d_model" else 1 if scale is None else scale
    )


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "power-of-two-heads": {"n_heads": 8},
    "bias": {"no_bias": False},
    "clip": {"attention": {"clip_qkv": 0.8}},
    "scale": {"attention": {"softmax_scale": 0.9}},
    "qk_ln": {"attention": {"qk_ln": True}},
    "qk_ln+clip+bias": {"attention": {"qk_ln": True, "clip_qkv": 1}, "no_bias": False},
    "mqa": {"attention": {"attn_type": "multiquery_attention", "qk_ln": True}},
    "gqa": {"attention": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}},
    "no-alibi": {"attention": {"alibi": False}},
    "no-positions": {"attention": {"alibi": False}, "learned_pos_emb": False},
    "bias-max": {"attention": {"alibi_bias_max": 16}},
    "logit-scale": {"logit_scale": 0.25},
    "logit-scale-word": {"logit_scale": "inv_sqrt_d_model"},
    "narrow": {"expansion_ratio": 2},
    "fraction-of-width": {"expansion_ratio": 1.5},
    "rms": {"norm_type": "rmsnorm", "no_bias": False},
    "rms-low": {"norm_type": "low_precision_rmsnorm"},
    "epsilon": {"layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False},
}


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def run(raw: Any, arrays: Arrays, ids: torch.Tensor, order: Order, storage: StorageName) -> Any:
    model = Reference(raw, arrays.__getitem__, storage=storage, order=order)
    return model.forward(ids).double()


@pytest.mark.parametrize("name", FEATURES)
def test_golden_is_the_forward_written_from_the_formulae(
    name: str, raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    made = raw(**FEATURES[name])
    arrays = checkpoint(made)
    golden = run(made, arrays, ids, GOLDEN, "float32")
    other = forward(made, arrays, ids.numpy())
    # The same two mathematics in float32 differ by what the orders differ; float64 divides every
    # rounding by 2^29. Two evaluations are compared, so that both may err.
    single = [
        run(made, arrays, ids, order, "float32")
        for order in (*legitimate_orders("float32"), *held_out_orders("float32"))
        if order.compute == "float32"
    ]
    limit = 2 * max(distance(value, golden) for value in single) * 2.0**-29
    assert 0 < distance(other, golden) <= limit


# What a model that ignores the field would compute instead, from the same tensors.
IGNORING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip_qkv": ({"attention": {"clip_qkv": 0.8}}, {"clip_qkv": None}),
    "softmax_scale": ({"attention": {"softmax_scale": 0.9}}, {"softmax_scale": None}),
    "qk_ln": ({"attention": {"qk_ln": True}}, {"qk_ln": False}),
    "alibi": ({}, {"alibi": False, "learned_pos_emb": False}),
    "wpe": ({"attention": {"alibi": False}}, {"learned_pos_emb": False}),
    "wpe-or-alibi": ({"attention": {"alibi": False}}, {"alibi": True}),
    "alibi_bias_max": ({"attention": {"alibi_bias_max": 16}}, {"alibi_bias_max": 8}),
    "logit_scale": ({"logit_scale": "inv_sqrt_d_model"}, {"logit_scale": None}),
    "norm_type": ({"norm_type": "rmsnorm"}, {"norm_type": "layernorm"}),
    "layer_norm_epsilon": ({"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-5}),
    "tie_word_embeddings": ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    "n_heads": ({}, {"n_heads": 8, "kv_n_heads": 8}),
    "n_layers": ({}, {"n_layers": 1}),
    "no_bias": ({"no_bias": False}, {"no_bias": True}),
}


@pytest.mark.parametrize("field", IGNORING)
def test_ignoring_a_field_shows_in_float16(
    field: str, raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    features, instead = IGNORING[field]
    made = raw(**features)
    arrays = checkpoint(made)
    golden = run(made, arrays, ids, GOLDEN, "float16")
    ignoring = run(replace(MPTConfig.from_dict(made), **instead), arrays, ids, GOLDEN, "float16")
    envelope = max(
        distance(run(made, arrays, ids, order, "float16"), golden)
        for order in legitimate_orders("float16")
    )
    assert distance(ignoring, golden) > envelope


@pytest.mark.parametrize(
    "features",
    [
        {"norm_type": "layernorm"},
        {"learned_pos_emb": False},
        {"attention": {"clip_qkv": 0}},
        {"attention": {"attn_impl": "triton", "attn_pdrop": 0.1}},
        {"resid_pdrop": 0.2, "init_device": "meta"},
    ],
    ids=str,
)
def test_fields_without_effect_have_none(
    features: dict[str, Any], raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    arrays = checkpoint(raw())
    plain = run(raw(), arrays, ids, GOLDEN, "float32")
    assert torch.equal(run(raw(**features), arrays, ids, GOLDEN, "float32"), plain)


def test_embedding_fraction_costs_roundings_and_nothing_else(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    made, arrays = raw(embedding_fraction=0.3), checkpoint(raw())
    for storage in ("float16", "bfloat16", "float32"):
        order = ORIGINAL(storage)  # type: ignore[arg-type]
        model = Reference(made, arrays.__getitem__, storage=storage, order=order)
        hidden, rows = (model.embed(ids)[n] for n in ("hidden", "transformer.wte"))
        assert not torch.equal(hidden, rows)
        # Two products and a sum round once each, every one of them below |x|; the smallest step of
        # float16 stands in for the relative error of numbers below its normal ones.
        unit = torch.finfo(getattr(torch, storage)).eps / 2
        assert ((hidden - rows).abs() <= 3 * unit * rows.abs() + 3 * 2.0**-25).all()


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["plain", "qk_ln+clip+bias", "gqa", "no-alibi", "rms"])
def test_held_out_orders_err_like_calibrated_ones(
    name: str, storage: Any, raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    """Every order errs; none by more than the rounding of storage explains for a few layers."""
    made = raw(**FEATURES[name])
    arrays = checkpoint(made)
    golden = run(made, arrays, ids, GOLDEN, storage)

    def worst(orders: tuple[Order, ...]) -> float:
        errors = [distance(run(made, arrays, ids, order, storage), golden) for order in orders]
        assert min(errors) > 0
        return max(errors)

    # The number of roundings a value passes on its way, each of one unit and of either sign, and a
    # block does not amplify relative errors of its stream by more than its own width of 1.5^2.
    unit = torch.finfo(getattr(torch, storage)).eps / 2
    roundings = 12 * made["n_layers"] + 4
    assert worst(legitimate_orders(storage)) <= roundings * unit * 2
    assert worst(held_out_orders(storage)) <= roundings * unit * 2
    assert worst((ORIGINAL(storage),)) <= roundings * unit * 2


def test_low_precision_costs_what_its_unit_says(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    made, arrays = raw(), checkpoint(raw())
    errors = {}
    for storage in ("float32", "float16", "bfloat16"):
        golden = run(made, arrays, ids, GOLDEN, storage)  # type: ignore[arg-type]
        order = legitimate_orders(storage)[0]  # type: ignore[arg-type]
        errors[storage] = distance(run(made, arrays, ids, order, storage), golden)  # type: ignore
    # 8 and 13 bits lie between; half a bit more or less is the luck of one sample.
    assert 2**2.5 < errors["bfloat16"] / errors["float16"] < 2**3.5
    assert 2**11 < errors["float16"] / errors["float32"] < 2**14


def test_parts_chained_are_the_forward(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    model = Reference(raw(), checkpoint(raw()).__getitem__, storage="float16")
    hidden = model.embed(ids.numpy())["hidden"]
    for layer in range(2):
        hidden = model.block(layer, hidden)["output"]
    assert torch.equal(model.head(hidden)["logits"], model.forward(ids))
    assert model.order == ORIGINAL("float16")


def test_layers_have_their_own_weights(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    model = Reference(raw(), checkpoint(raw()).__getitem__)
    hidden = model.embed(ids)["hidden"]
    assert not torch.equal(model.block(0, hidden)["norm_1"], model.block(1, hidden)["norm_1"])


def test_the_bias_of_the_subject_is_alibi_or_nothing(
    raw: Make, checkpoint: Callable[..., Arrays]
) -> None:
    with_alibi = Reference(raw(), checkpoint(raw()).__getitem__)
    assert with_alibi.attention_bias(3, 5)[0, 2].tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0]
    bare = raw({"alibi": False})
    without = Reference(bare, checkpoint(bare).__getitem__).attention_bias(3, 5)
    assert torch.equal(without, torch.zeros(6, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_arrays_become_tensors_of_the_same_numbers(dtype: Any) -> None:
    array = np.array([[1.5, -2.0, 3.140625]]).astype(dtype)
    array.flags.writeable = False
    tensor = as_tensor(array)
    assert str(tensor.dtype) == f"torch.{np.dtype(dtype).name}"
    assert tensor.tolist() == [[1.5, -2.0, 3.140625]]
    tensor.zero_()
    assert array[0, 0] == 1.5


def test_weights_are_rounded_to_storage_before_they_are_widened() -> None:
    array = np.array([1 / 3], np.float32)
    wide = as_tensor(array, storage="float16", dtype="float64")
    assert wide.dtype == torch.float64
    assert wide.item() == float(np.float16(1 / 3))


def test_a_tensor_of_another_shape_is_named(raw: Make, checkpoint: Callable[..., Arrays]) -> None:
    config, arrays = MPTConfig.from_dict(raw()), dict(checkpoint(raw()))
    arrays["transformer.blocks.1.ffn.up_proj.weight"] = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.up_proj\.weight: expected shape \(192"):
        block_weights(config, 1, arrays.__getitem__)
    with pytest.raises(ValueError, match="layer: expected 0 to 1, found 2"):
        block_weights(config, 2, arrays.__getitem__)
    weights = block_weights(config, 0, arrays.__getitem__)
    assert len(weights) == 6
    changed = weights.replaced("norm_1.weight", torch.zeros(48))
    assert not torch.equal(changed["norm_1.weight"], weights["norm_1.weight"])
