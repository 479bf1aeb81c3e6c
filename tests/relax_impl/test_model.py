"""Every tap of every kind of MPT against float64, and the deployed function against the taps."""

from __future__ import annotations

import numpy as np
import pytest

from relax_impl.kernels.cpu import FAST
from relax_impl.operations import PLAIN

SHAPES = [(1, 1), (2, 17), (3, 33)]
FEATURES = {
    "alibi": ({}, {}),
    "wpe": ({"alibi": False}, {}),
    "neither": ({"alibi": False}, {"learned_pos_emb": False, "logit_scale": 0}),
    "mqa": ({"attn_type": "multiquery_attention"}, {"no_bias": False}),
    "gqa": ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "qk_ln": ({"qk_ln": True}, {"no_bias": False}),
    "clip": ({"clip_qkv": 0.5, "softmax_scale": 0.7, "alibi_bias_max": 16}, {}),
    "rmsnorm": ({}, {"norm_type": "low_precision_rmsnorm", "no_bias": False}),
    "head": ({}, {"tie_word_embeddings": False, "logit_scale": "inv_sqrt_d_model"}),
    "odd": (
        {"qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 1, "clip_qkv": 1},
        # No width is a multiple of 16, heads are 7 wide, the MLP is 1.5 times as wide.
        {"d_model": 42, "expansion_ratio": 1.5, "embedding_fraction": 0.3, "logit_scale": 0.25},
    ),
}
RUNS = [(name, "float32", "FAST") for name in FEATURES]
RUNS += [(name, dtype, "FAST") for name in ("qk_ln", "odd") for dtype in ("float16", "bfloat16")]
RUNS += [("odd", dtype, "PLAIN") for dtype in ("float16", "bfloat16", "float32")]
RUNS += [("gqa", "float16", "PLAIN"), ("rmsnorm", "float32", "PLAIN")]


def walk(built, ids):
    """Every tap, named by its place, with what float64 says; and the logits of the chain."""
    model, steps = built.model, built.steps
    taps = model.embed(ids)
    pairs = {n: (taps[n], b) for n, b in steps.embed(ids, taps).items()}
    hidden = taps["hidden"]
    for layer in range(model.config.n_layers):
        taps = model.block(layer, hidden)
        expected = steps.block(layer, hidden, taps)
        assert list(taps) == list(expected)
        pairs |= {f"{layer}.{n}": (taps[n], b) for n, b in expected.items()}
        hidden = taps["output"]
    taps = model.head(hidden)
    pairs |= {n: (taps[n], b) for n, b in steps.head(hidden, taps).items()}
    return pairs, taps["logits"]


@pytest.mark.parametrize(("feature", "dtype", "operations"), RUNS)
def test_every_step_is_within_its_error_bound(feature, dtype, operations, raw, build):
    chosen = {"FAST": FAST, "PLAIN": PLAIN}[operations]
    attn, top = FEATURES[feature]
    built = build(raw(attn, **top), dtype, lambda layer: chosen)
    for b, s in SHAPES:
        ids = np.random.default_rng(s).integers(0, 91, (b, s))
        pairs, logits = walk(built, ids)
        excess = {name: bound.excess(found) for name, (found, bound) in pairs.items()}
        assert {name: e for name, e in excess.items() if not e <= 1} == {}
        stored = {name: str(found.dtype) for name, (found, _) in pairs.items() if name != "logits"}
        assert set(stored.values()) == {dtype}
        forward = built.model.forward(ids)
        assert forward.dtype == np.float32
        # The deployed function rounds where the taps are, and sums in the same order.
        assert np.array_equal(forward, logits)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_do_not_depend_on_their_batch_or_their_future(dtype, raw, build):
    built = build(raw(), dtype)
    ids = np.random.default_rng(3).integers(0, 91, (3, 35))
    whole = built.model.forward(ids)
    alone = np.concatenate([built.model.forward(row[None]) for row in ids])
    assert np.array_equal(whole, alone)
    for length in (1, 2, 3, 4, 5, 17):
        assert np.array_equal(built.model.forward(ids[:, :length]), whole[:, :length])
