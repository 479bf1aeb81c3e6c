"""transformers: what it honours is bit for bit the original's order, what it ignores is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mpt import modeling_mpt
from transformers.models.mpt.configuration_mpt import MptConfig

from reference.alibi import bias_differences, slopes
from reference.config import ConfigError, MPTConfig
from reference.hub import HubModel, NotHonoured, hub_config, ignored_fields
from reference.model import Reference, block_steps
from reference.orders import ORIGINAL

Make = Callable[..., dict[str, Any]]
Arrays = Mapping[str, np.ndarray]

HONOURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "power-of-two-heads": {"n_heads": 8},
    "one-head": {"n_heads": 1},
    "clip": {"attention": {"clip_qkv": 0.8}},
    "clip-int": {"attention": {"clip_qkv": 6}},
    "clip-zero": {"attention": {"clip_qkv": 0}},
    "scale": {"attention": {"softmax_scale": 0.9}},
    "scale-int": {"attention": {"softmax_scale": 1}},
    "dropout": {"attention": {"attn_pdrop": 0.0}, "resid_pdrop": 0.1},
    "positions-beside-alibi": {"learned_pos_emb": True},
    "epsilon": {"layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False},
    "whole-ratio": {"expansion_ratio": 4.0},
    "bias-max": {"attention": {"alibi_bias_max": 8.0}},
    "one-kv-head-of-one": {"n_heads": 1, "attention": {"attn_type": "multiquery_attention"}},
    "neutral-scale": {"logit_scale": 1},
    "norm": {"norm_type": "layernorm"},
}


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", HONOURED)
def test_honoured_fields_give_the_originals_bits(
    name: str,
    storage: Any,
    raw: Make,
    checkpoint: Callable[..., Arrays],
    ids: torch.Tensor,
) -> None:
    made = raw(**HONOURED[name])
    arrays = checkpoint(made)
    assert ignored_fields(made) == ()
    hub = HubModel(made, arrays.__getitem__, storage=storage)
    original = Reference(made, arrays.__getitem__, storage=storage, order=ORIGINAL(storage))
    logits = hub.forward(ids)
    assert logits.dtype == getattr(torch, storage)
    assert torch.equal(logits.float(), original.forward(ids))
    hidden = hub.embed(ids)["hidden"]
    for layer in range(2):
        block, expected = hub.block(layer, hidden), original.block(layer, hidden)
        assert list(block) == list(expected)
        for tap, value in block.items():
            assert torch.equal(value.float(), expected[tap]), tap
        hidden = block["output"]
    for tap, value in hub.head(hidden).items():
        assert torch.equal(value.float(), original.head(hidden)[tap])
    assert torch.equal(hub.head(hidden)["logits"], logits)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_one_token_has_its_bits_too(
    storage: Any, raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    arrays = checkpoint(raw())
    hub = HubModel(raw(), arrays.__getitem__, storage=storage)
    original = Reference(raw(), arrays.__getitem__, storage=storage)
    assert torch.equal(hub.forward(ids[:, :1]).float(), original.forward(ids[:, :1]))


def test_overflowing_scores_have_its_bits_too(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    arrays = dict(checkpoint(raw()))
    for layer in range(2):
        arrays[f"transformer.blocks.{layer}.attn.Wqkv.weight"] *= 100
    hub = HubModel(raw(), arrays.__getitem__, storage="float16")
    original = Reference(raw(), arrays.__getitem__, storage="float16")
    logits = hub.forward(ids).float()
    assert torch.isnan(logits).any()
    torch.testing.assert_close(logits, original.forward(ids), rtol=0, atol=0, equal_nan=True)


def test_a_trace_is_the_forward_with_its_taps(
    raw: Make, checkpoint: Callable[..., Arrays], ids: torch.Tensor
) -> None:
    made = raw({"clip_qkv": 0.8})
    hub = HubModel(made, checkpoint(made).__getitem__)
    trace = hub.trace(ids)
    assert torch.equal(trace["logits"], hub.forward(ids))
    steps = [s.tap for s in block_steps(hub.config, ORIGINAL("float32"))]
    assert list(trace) == [
        "transformer.wte",
        *(f"transformer.blocks.{layer}.{tap}" for layer in range(2) for tap in steps),
        "transformer.norm_f",
        "logits",
    ]
    assert trace["transformer.blocks.1.attn.Wqkv"].abs().max() == np.float32(0.8)
    stream = trace["transformer.blocks.0.output"]
    for tap, value in hub.block(1, stream).items():
        assert torch.equal(value, trace[f"transformer.blocks.1.{tap}"])
    # No hook and no exchange of blocks outlives a call.
    assert len(hub.model.transformer.blocks) == 2
    assert not any(module._forward_hooks for module in hub.model.modules())


# Field, how to set it, and what transformers itself says of it.
IGNORED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attn_config.alibi": ({"attention": {"alibi": False}, "learned_pos_emb": False}, {}),
    "attn_config.alibi_bias_max": ({"attention": {"alibi_bias_max": 16}}, {}),
    "attn_config.qk_ln": ({"attention": {"qk_ln": True}}, {}),
    "attn_config.attn_type": ({"attention": {"attn_type": "multiquery_attention"}}, {}),
    "attn_config.prefix_lm": ({"attention": {"prefix_lm": True}}, {}),
    "attn_config.attn_uses_sequence_id": ({"attention": {"attn_uses_sequence_id": True}}, {}),
    "no_bias": ({"no_bias": False}, {}),
    "expansion_ratio": ({"expansion_ratio": 2}, {}),
    "logit_scale": ({"logit_scale": 0.25}, {}),
    "norm_type": ({"norm_type": "rmsnorm"}, {}),
}


def own(raw: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """The logits that transformers makes of a raw config, weights by one seed."""
    torch.manual_seed(0)
    config = MptConfig(**raw, attn_implementation="eager", initializer_range=0.3)
    model = modeling_mpt.MptForCausalLM(config).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("field", IGNORED)
def test_an_ignored_field_changes_nothing_in_transformers(
    field: str, raw: Make, ids: torch.Tensor
) -> None:
    made = raw(**IGNORED[field][0])
    assert [found.field for found in ignored_fields(made)] == [field]
    assert torch.equal(own(made, ids), own(raw(), ids))


HONOURED_BY_EFFECT: dict[str, dict[str, Any]] = {
    "clip_qkv": {"attention": {"clip_qkv": 0.1}},
    "softmax_scale": {"attention": {"softmax_scale": 0.9}},
    "layer_norm_epsilon": {"layer_norm_epsilon": 0.1},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "n_heads": {"n_heads": 8},
}


@pytest.mark.parametrize("field", HONOURED_BY_EFFECT)
def test_an_honoured_field_changes_something_in_transformers(
    field: str, raw: Make, ids: torch.Tensor
) -> None:
    made = raw(**HONOURED_BY_EFFECT[field])
    assert ignored_fields(made) == ()
    assert not torch.equal(own(made, ids), own(raw(), ids))


def test_embedding_fraction_is_read_past_and_left_alone(raw: Make, ids: torch.Tensor) -> None:
    # Idle in inference, so that it is no reason to refuse; its roundings are not made.
    made = raw(embedding_fraction=0.5)
    assert ignored_fields(made) == ()
    assert torch.equal(own(made, ids), own(raw(), ids))


def test_grouped_queries_do_not_even_construct(raw: Make, ids: torch.Tensor) -> None:
    made = raw({"attn_type": "grouped_query_attention", "kv_n_heads": 2})
    assert [found.field for found in ignored_fields(made)] == ["attn_config.attn_type"]
    with pytest.raises(Exception, match="attn_type"):
        own(made, ids)


def test_learned_positions_do_not_exist(raw: Make, ids: torch.Tensor) -> None:
    made = raw({"alibi": False}, learned_pos_emb=True)
    fields = [found.field for found in ignored_fields(made)]
    assert fields == ["attn_config.alibi", "learned_pos_emb"]
    assert torch.equal(own(made, ids), own(raw(), ids))


def test_a_minimal_config_means_what_the_original_means_and_is_refused() -> None:
    assert [found.field for found in ignored_fields({})] == [
        "attn_config.alibi",
        "learned_pos_emb",
        "no_bias",
    ]
    with pytest.raises(NotHonoured) as caught:
        HubModel({}, lambda name: pytest.fail(f"read {name}"))
    assert caught.value.fields[0].field == "attn_config.alibi"
    assert "attn_config.alibi is False, transformers computes with ALiBi" in str(caught.value)


def test_every_ignored_field_is_named_at_once(raw: Make) -> None:
    made = raw({"qk_ln": True, "prefix_lm": True, "alibi_bias_max": 16}, logit_scale=0)
    assert [found.field for found in ignored_fields(made)] == [
        "attn_config.prefix_lm",
        "attn_config.alibi_bias_max",
        "attn_config.qk_ln",
        "logit_scale",
    ]
    assert made["attn_config"]["prefix_lm"] is True


def test_a_config_that_is_no_mpt_is_an_error_and_not_an_ignored_field() -> None:
    with pytest.raises(ConfigError):
        ignored_fields({"d_model": "wide"})
    with pytest.raises(ConfigError):
        ignored_fields({"attn_config": {"rope": True}})


# What released configs hold and transformers' own class rejects or takes, by its strict types.
STRICT: list[tuple[dict[str, Any], str]] = [
    ({"attention": {"clip_qkv": 6}}, "clip_qkv"),
    ({"attention": {"attn_pdrop": 0.0}}, "attn_pdrop"),
    ({"attention": {"softmax_scale": 1}}, "softmax_scale"),
    ({"embedding_fraction": 1}, "embedding_fraction"),
    ({"expansion_ratio": 4.0}, "expansion_ratio"),
    ({"attention": {"alibi_bias_max": 8.0}}, "alibi_bias_max"),
    ({"logit_scale": 1}, "logit_scale"),
]


@pytest.mark.parametrize(("features", "field"), STRICT, ids=str)
def test_types_that_it_rejects_are_brought_into_its_form(
    features: dict[str, Any], field: str, raw: Make
) -> None:
    made = raw(**features)
    with pytest.raises(Exception, match=field):
        MptConfig(**made)
    config = hub_config(MPTConfig.from_dict(made))
    assert config.attn_config.clip_qkv == made["attn_config"].get("clip_qkv")
    assert config.attn_config.softmax_scale == made["attn_config"].get("softmax_scale")


@pytest.mark.parametrize("lengths", [(1, 1), (1, 20), (5, 20), (20, 20), (64, 64)], ids=str)
@pytest.mark.parametrize(
    "features", [{}, {"n_heads": 8}, {"attention": {"clip_qkv": 0.5}}], ids=str
)
def test_the_alibi_bias_is_measured_in_the_deployed_attention(
    features: dict[str, Any],
    lengths: tuple[int, int],
    raw: Make,
    checkpoint: Callable[..., Arrays],
) -> None:
    made = raw(**features)
    hub = HubModel(made, checkpoint(made).__getitem__)
    measured = hub.attention_bias(*lengths)
    queries, keys = lengths
    assert measured.shape == (made["n_heads"], queries, keys)
    past = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.isinf(measured[:, ~past]).all()
    assert (measured[:, torch.arange(queries), torch.arange(queries) + keys - queries] == 0).all()
    steps = bias_differences(measured)
    inside = past[:, 1:].expand_as(steps)
    expected = slopes(made["n_heads"])[:, None, None].expand_as(steps)
    # In float32 a score of at most `keys` is rounded, as is what is left after the maximum (below
    # 8 in a window) and its exponential, sum and quotient; two probabilities make a step.
    limit = 2 * 2.0**-24 * (2 * keys + 8 + 16)
    assert ((steps - expected)[inside].abs() <= limit).all()


def test_a_wrong_alibi_in_the_deployed_code_shows(
    raw: Make, checkpoint: Callable[..., Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HubModel(raw(), checkpoint(raw()).__getitem__)
    right = hub.attention_bias(4, 12)
    build = modeling_mpt.build_mpt_alibi_tensor
    monkeypatch.setattr(
        modeling_mpt, "build_mpt_alibi_tensor", lambda *args, **kw: build(*args, **kw) * 2
    )
    finite = torch.isfinite(right)
    wrong = hub.attention_bias(4, 12)
    doubled = (wrong - 2 * right)[finite].abs().max()
    assert doubled <= 12 * 3 * 2 * 2.0**-24 * (2 * 24 + 24)
    assert (wrong - right)[finite].abs().max() > 1


@pytest.mark.parametrize("lengths", [(0, 4), (5, 4), (65, 65)])
def test_impossible_lengths_are_refused(
    lengths: tuple[int, int], raw: Make, checkpoint: Callable[..., Arrays]
) -> None:
    hub = HubModel(raw(), checkpoint(raw()).__getitem__)
    with pytest.raises(ValueError, match="attention_bias: expected"):
        hub.attention_bias(*lengths)
