"""The kernels beside the operators they stand for: on ordinary values, and on those that are not.

How far either is from float64 is held by `test_model`; here the two are held against each other.
"""

from __future__ import annotations

import numpy as np
import pytest

from relax_impl.compile import compile_model
from relax_impl.config import MPTConfig
from relax_impl.kernels.cpu import FAST
from relax_impl.loader import load_parameters, mapping
from relax_impl.operations import PLAIN
from relax_impl.runtime import Model

BEFORE_ATTENTION = ("norm_1", "attn.Wqkv")
DTYPES = ("float16", "bfloat16", "float32")
CASES = [*(("alibi", dtype) for dtype in DTYPES), ("clipped", "float32"), ("rms", "float16")]
KINDS = {
    "alibi": ({}, {}),
    "clipped": ({"clip_qkv": 0.5}, {"no_bias": False}),
    "rms": ({}, {"norm_type": "rmsnorm"}),
}


@pytest.fixture(scope="module")
def both(raw, build):
    made = {}

    def make(kind, dtype):
        if (kind, dtype) not in made:
            attn, top = KINDS[kind]
            made[kind, dtype] = tuple(
                build(raw(attn, n_layers=1, **top), dtype, lambda layer, o=o: o)
                for o in (FAST, PLAIN)
            )
        return made[kind, dtype]

    return make


def stream(both, kind, dtype, length=20):
    ids = np.random.default_rng(2).integers(0, 91, (2, length))
    fast, plain = (built.model.embed(ids)["hidden"] for built in both(kind, dtype))
    # Nothing is computed where rows are only gathered.
    assert np.array_equal(fast, plain)
    return fast


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_they_differ_by_no_more_than_both_may_be_off(kind, dtype, both):
    hidden = stream(both, kind, dtype)
    found = []
    for built in both(kind, dtype):
        taps = built.model.block(0, hidden)
        found.append((taps, built.steps.block(0, hidden, taps)))
    (fast, of_fast), (plain, of_plain) = found
    assert list(fast) == list(plain)
    # The first tap has the same input in both, so the triangle through float64 holds.
    difference = abs(fast["norm_1"].astype(np.float64) - plain["norm_1"].astype(np.float64))
    assert (difference <= of_fast["norm_1"].error + of_plain["norm_1"].error).all()
    # What follows has inputs that may differ by a rounding each; both are right about their own.
    for taps, bounds in found:
        assert max(bound.excess(taps[name]) for name, bound in bounds.items()) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "huge"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("alibi", "float16"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in CASES[1:]
            if case[1] != "bfloat16"
        ),
    ],
)
def test_they_agree_on_what_is_no_number(bad, kind, dtype, both):
    hidden = stream(both, kind, dtype).copy()
    # In the last position: earlier rows must not see it, but zero times it is open for them.
    hidden[1, -1, 5] = np.finfo(dtype).max if bad == "huge" else bad
    fast, plain = (built.model.block(0, hidden) for built in both(kind, dtype))
    for name in fast:
        a, b = (
            taps[name] if name in BEFORE_ATTENTION else taps[name][:, -1] for taps in (fast, plain)
        )
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        assert np.array_equal(np.isposinf(a), np.isposinf(b)), name
        assert np.array_equal(np.isneginf(a), np.isneginf(b)), name
        assert np.isfinite(a[0]).all(), name
    assert (bad == "huge") == np.isfinite(fast["norm_1"]).all()


@pytest.fixture(scope="module")
def libraries(raw):
    config = MPTConfig.from_dict(raw(n_layers=1, no_bias=False))
    return [compile_model(config, "float32", "llvm", lambda layer, o=o: o) for o in (FAST, PLAIN)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "place",
    [
        "ffn.up_proj.bias",
        pytest.param("ffn.down_proj.bias", marks=pytest.mark.long),
        pytest.param("attn.out_proj.bias", marks=pytest.mark.long),
    ],
)
def test_they_agree_after_a_bias_that_is_no_number(bad, place, libraries, make_checkpoint):
    hidden = np.random.default_rng(4).standard_normal((1, 9, 48)).astype(np.float32)
    found = []
    for library in libraries:
        checkpoint = make_checkpoint(library.config, "float32")
        checkpoint.arrays[f"transformer.blocks.0.{place}"][3] = bad
        weight_map = mapping(library.config, library.layout)
        parameters = load_parameters(library.config, checkpoint, "float32", weight_map)
        found.append(Model(library, parameters).block(0, hidden))
    fast, plain = found
    assert place.removesuffix(".bias") in [n for n in fast if not np.isfinite(fast[n]).all()]
    for step in fast:
        for what in (np.isnan, np.isposinf, np.isneginf):
            assert np.array_equal(what(fast[step]), what(plain[step])), (step, what)
