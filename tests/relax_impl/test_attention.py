"""The attention kernel on its own: closed forms, long sequences, values that are no numbers."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from relax_impl.attention import Attention, cast
from relax_impl.config import MPTConfig
from relax_impl.kernels.cpu import FAST
from relax_impl.kernels.cpu.attention import flash_kernel
from relax_impl.operations import PLAIN

KINDS = [
    ("FAST", {}, {}),
    ("PLAIN", {}, {}),
    ("FAST", {"attn_type": "multiquery_attention", "alibi_bias_max": 16}, {}),
    ("FAST", {"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {"d_model": 126}),
    ("FAST", {"alibi": False}, {"d_model": 480}),
]


@pytest.fixture
def attend(raw, build):
    def make(operations, attn, top, dtype="float32"):
        chosen = {"FAST": FAST, "PLAIN": PLAIN}[operations]
        built = build(raw(attn, n_layers=1, **top), dtype, lambda layer: chosen)
        return built.model.config, built.model.attend

    return make


@pytest.mark.parametrize(("operations", "attn", "top"), KINDS)
def test_queries_are_the_last_of_the_keys(operations, attn, top, attend, exact):
    config, run = attend(operations, attn, top)
    random = np.random.default_rng(0)
    for b, sq, sk in [(1, 1, 1), (2, 1, 130), (1, 7, 33), (2, 50, 50), (1, 100, 300), (1, 2, 129)]:
        q = random.standard_normal((b, sq, config.n_heads, config.head_dim)).astype(np.float32)
        k, v = random.standard_normal((2, b, sk, config.kv_n_heads, config.head_dim)).astype("f4")
        wide = (a.astype(np.float64) for a in (q, k, v))
        bound = exact.attend(config, *wide, exact.slopes(config)).stored("float32")
        assert bound.excess(run(q, k, v)) <= 1
        whole = run(np.concatenate([np.ones_like(q[:, :1])] * (sk - sq) + [q], axis=1), k, v)
        if operations == "FAST":
            # How many queries are asked together changes no bit.
            assert np.array_equal(whole[:, sk - sq :], run(q, k, v))


@pytest.mark.parametrize("operations", ["FAST", "PLAIN"])
def test_without_scores_the_context_is_the_softmax_of_the_bias(operations, attend, exact):
    config, run = attend(operations, {}, {"n_heads": 3})
    s, d = 16, config.head_dim
    zero = np.zeros((1, s, 3, d), np.float32)
    one_hot = np.zeros((1, s, 3, d), np.float32)
    one_hot[0, np.arange(s), :, np.arange(s)] = 1
    context = run(zero, zero, one_hot)[0, :, :, :s].astype(np.float64)
    # A geometric series: the weight of a key falls by e^-slope per position.
    for head, slope in enumerate(exact.slopes(config)):
        for i in range(s):
            ratio = np.exp(-slope)
            expected = ratio ** np.arange(i, -1, -1) * (1 - ratio) / (1 - ratio ** (i + 1))
            # exp to 16 roundings, a sum of 16 lanes, a division.
            bound = 2 * (16 + 16 + 1) * exact.unit["float32"] * expected
            assert (abs(context[i, head, : i + 1] - expected) <= bound).all()
            assert not context[i, head, i + 1 :].any()


def test_the_steepest_bias_of_65536_positions(attend, exact):
    # Bias -5.5e4 at the far end: the start of the running maximum must lie below.
    config, run = attend("FAST", {"alibi_bias_max": 16}, {"d_model": 32, "n_heads": 32})
    sk = 65536
    random = np.random.default_rng(1)
    q = random.standard_normal((1, 2, 32, 1)).astype(np.float32)
    k, v = random.standard_normal((2, 1, sk, 32, 1)).astype(np.float32)
    # Only the first key of each head can be reached: the others are pushed away by their scores.
    k[:, 1:], q[:] = -1e5, 1.0
    wide = (a.astype(np.float64) for a in (q, k, v))
    bound = exact.attend(config, *wide, exact.slopes(config)).stored("float32")
    context = run(q, k, v)
    assert bound.excess(context) <= 1
    assert np.array_equal(context[0, 0, :, 0], v[0, 0, :, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_beyond_the_range_of_float16_are_harmless(dtype, attend, exact):
    config, run = attend("FAST", {}, {}, dtype)
    shape = (1, 20, 6, 8)
    q, k = (np.full(shape, 200.0).astype(exact.numpy[dtype]) for _ in range(2))
    v = np.random.default_rng(0).standard_normal(shape).astype(exact.numpy[dtype])
    wide = [a.astype(np.float64) for a in (q, k, v)]
    bound = exact.attend(config, *wide, exact.slopes(config)).stored(dtype)
    assert (wide[0] @ wide[1].swapaxes(-1, -2)).max() > 65504
    assert bound.excess(run(q, k, v)) <= 1


@pytest.mark.parametrize("operations", ["FAST", "PLAIN"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_reaches_every_row_that_sees_it(operations, bad, attend):
    _, run = attend(operations, {}, {})
    random = np.random.default_rng(0)
    q, k, v = abs(random.standard_normal((3, 1, 140, 6, 8))).astype(np.float32)
    for place in ("k", "v", "q"):
        arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        arrays[place][0, 40, 2, 3] = bad
        sick = ~np.isfinite(run(**arrays)[0]).all(-1)
        expected = np.zeros((140, 6), bool)
        expected[40 : 41 if place == "q" else None, 2] = True
        if place == "v":
            # Zero times it is no number either: which of the rows before are sick is open.
            expected[:40, 2] = sick[:40, 2]
        assert np.array_equal(sick, expected)


def test_no_buffer_is_as_large_as_queries_times_keys():
    config = MPTConfig.from_dict({"d_model": 64, "n_heads": 4, "attn_config": {"alibi": True}})
    kernel = flash_kernel(FAST.attention, config, "float32", config.scale, False)
    shapes = re.findall(r"alloc_buffer\(\((.*?)\)[,)]", kernel.script())
    assert sum("sk" in shape for shape in shapes) == 2
    assert [shape for shape in shapes if "sq" in shape] == []


def test_hooks_reach_both_lowerings(raw, build):
    def quarter(score):
        return score * 0.25

    shape = (1, 30, 6, 8)
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    for base in (FAST, PLAIN):
        pieces = {
            "healthy": Attention(lowering=base.attention.lowering),
            "bias": dataclasses.replace(base.attention, bias=lambda slope, d: slope * (0.0 - d)),
            "mask": dataclasses.replace(base.attention, visible=None),
            "self": dataclasses.replace(base.attention, visible=lambda q, k: k < q),
            "scale": dataclasses.replace(base.attention, scale=lambda config: 1.0),
            "score": dataclasses.replace(base.attention, score=quarter),
            "probability": dataclasses.replace(base.attention, probability=lambda p: p * 2.0),
        }
        layers = [dataclasses.replace(base, attention=piece) for piece in pieces.values()]
        model = build(
            raw(n_layers=len(layers)), "float32", lambda n, o=layers: o[max(0, n) % len(o)]
        )
        contexts = [model.model.attend(q, k, v, layer=n) for n in range(len(layers))]
        plain = contexts if base is PLAIN else [c.copy() for c in contexts]
        for n, name in enumerate(pieces):
            assert np.array_equal(contexts[n], contexts[0]) == (name == "healthy"), name
        assert np.allclose(contexts[6], 2 * contexts[0], rtol=0, atol=0) or base is PLAIN
        if base is FAST:
            fast = plain
    uniform = v[0].astype(np.float64).mean(0)
    for a, b in zip(fast, contexts, strict=True):
        # Two orders of the same 30-term sums.
        assert abs(a - b).max() <= 200 * 2.0**-24 * abs(v).max()
    # A row that sees nothing is uniform over all keys, as with a finite mask value.
    assert abs(fast[3][0, 0] - uniform).max() <= 64 * 2.0**-24 * abs(v).max()


def test_hooks_may_cast_whatever_they_are_handed(raw, build):
    """Elements of a tensor are expressions by the time that a hook gets them, in both lowerings."""

    def wide_and_back(value):
        return cast(cast(value, "float64"), "float32")

    shape = (1, 20, 6, 8)
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    pieces = {
        "bias": lambda slope, distance: wide_and_back(slope) * wide_and_back(distance),
        "score": wide_and_back,
        "probability": wide_and_back,
    }
    for alibi in (True, False):
        for base in (FAST, PLAIN):
            plain = Attention(lowering=base.attention.lowering)
            casting = dataclasses.replace(plain, **pieces)
            layers = [dataclasses.replace(base, attention=piece) for piece in (plain, casting)]
            built = build(
                raw({"alibi": alibi}, n_layers=2), "float32", lambda n, o=layers: o[max(0, n) % 2]
            )
            contexts = [built.model.attend(q, k, v, layer=n) for n in (0, 1)]
            # Every float32 is a float64: nothing was rounded.
            assert np.array_equal(*contexts)
