"""The weight map: each tensor used once, and proved to arrive by content."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from relax_impl.config import MPTConfig
from relax_impl.layout import PANELS, ROWS
from relax_impl.loader import WeightMapError, load_parameters, mapping
from relax_impl.proof import prove, shrunk
from relax_impl.topology import topology

GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}
BLOCK = "transformer.blocks.1."


@pytest.fixture
def config(raw):
    return MPTConfig.from_dict(raw(GQA, no_bias=False, tie_word_embeddings=False))


@pytest.fixture
def checkpoint(config, make_checkpoint):
    return make_checkpoint(config, "bfloat16")


def entry(like, **changes):
    return types.SimpleNamespace(**{**vars(like), **changes})


@pytest.mark.parametrize("layout", [ROWS, PANELS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_map_is_proved(layout, dtype, config):
    proof = prove(config, mapping(config, layout), dtype)
    assert proof.holds and not proof.shrunk
    assert [finding.tensor for finding in proof.findings] == list(topology(config))
    assert all(finding.found_in == (finding.tensor,) for finding in proof.findings)


def test_released_models_are_proved_in_small():
    raw = {"d_model": 7168, "n_heads": 64, "n_layers": 48, "vocab_size": 50432}
    config = MPTConfig.from_dict({**raw, "no_bias": True, "attn_config": {"alibi": True}})
    proof = prove(config, mapping(config, PANELS), "float16")
    assert proof.holds and proof.shrunk
    assert len(proof.findings) == 290
    assert topology(shrunk(config)).keys() == topology(config).keys()


def swapped(one, other):
    def change(weight_map):
        sources = dict(weight_map.param_map)
        sources[one], sources[other] = sources[other], sources[one]
        return dataclasses.replace(weight_map, param_map=sources)

    return change


def taken_from(name, source):
    def change(weight_map):
        sources = {**weight_map.param_map, name: (source,)}
        return dataclasses.replace(weight_map, param_map=sources)

    return change


def mapped(name, function):
    def change(weight_map):
        before = weight_map.map_func[name]
        functions = {**weight_map.map_func, name: lambda *arrays: function(before, *arrays)}
        return dataclasses.replace(weight_map, map_func=functions)

    return change


def without(name):
    def change(weight_map):
        sources = {n: s for n, s in weight_map.param_map.items() if n != name}
        return dataclasses.replace(weight_map, param_map=sources)

    return change


def q_and_k_swapped(store, w):
    # Rows of GQA: 48 of q, then 16 of k and 16 of v; here k comes first.
    return store(np.concatenate([w[48:64], w[:48], w[64:]]))


def per_head(store, w):
    return store(w.reshape(5, 16, -1).swapaxes(0, 1).reshape(w.shape))


MUTATIONS = {
    "norms swapped": (swapped(BLOCK + "norm_1.weight", BLOCK + "norm_2.weight"), {"norm_1.weight"}),
    "q and k swapped": (mapped(BLOCK + "attn.Wqkv.weight", q_and_k_swapped), {"attn.Wqkv.weight"}),
    "rows per head": (mapped(BLOCK + "attn.Wqkv.weight", per_head), {"attn.Wqkv.weight"}),
    "square matrix transposed": (
        mapped(BLOCK + "attn.out_proj.weight", lambda store, w: store(np.ascontiguousarray(w.T))),
        {"attn.out_proj.weight"},
    ),
    "matrix transposed": (
        mapped(BLOCK + "ffn.up_proj.weight", lambda store, w: store(np.ascontiguousarray(w.T))),
        {"ffn.up_proj.weight"},
    ),
    "stale layer": (
        taken_from(BLOCK + "ffn.up_proj.weight", "transformer.blocks.0.ffn.up_proj.weight"),
        {"ffn.up_proj.weight"},
    ),
    "gain replaced by ones": (
        mapped(BLOCK + "norm_2.weight", lambda store, w: np.ones_like(w)),
        {"norm_2.weight"},
    ),
    "gain plus one": (
        mapped(BLOCK + "norm_2.weight", lambda store, w: w + 1),
        {"norm_2.weight"},
    ),
    "negated": (mapped(BLOCK + "norm_2.weight", lambda store, w: -w), {"norm_2.weight"}),
    "reversed": (mapped(BLOCK + "norm_2.bias", lambda store, w: w[::-1]), {"norm_2.bias"}),
    "shifted by one": (
        mapped(BLOCK + "norm_2.bias", lambda store, w: np.roll(w, 1)),
        {"norm_2.bias"},
    ),
    "last row lost": (
        mapped(BLOCK + "ffn.down_proj.weight", lambda store, w: store(w * (w != w[-1:, -1:]))),
        {"ffn.down_proj.weight"},
    ),
    "not packed": (mapped(BLOCK + "attn.Wqkv.weight", lambda store, w: w), {"attn.Wqkv.weight"}),
    "bias of another": (
        taken_from(BLOCK + "attn.out_proj.bias", BLOCK + "ffn.down_proj.bias"),
        {"attn.out_proj.bias"},
    ),
    "head tied after all": (
        taken_from("lm_head.weight", "transformer.wte.weight"),
        {"lm_head.weight"},
    ),
    "key norm forgotten": (without(BLOCK + "attn.k_ln.weight"), {"attn.k_ln.weight"}),
    "crash": (mapped(BLOCK + "norm_1.bias", lambda store, w: w[10**6]), {"norm_1.bias"}),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_map_is_refuted_at_the_tensor(name, dtype, config):
    change, expected = MUTATIONS[name]
    proof = prove(config, change(mapping(config, PANELS)), dtype)
    assert not proof.holds
    blamed = {finding.tensor.removeprefix(BLOCK) for finding in proof.problems}
    assert expected <= blamed
    # Whose tensor was taken twice or swapped is blamed too, nobody else.
    assert len(blamed) <= 2


def test_padding_is_told_from_content(config):
    # 91 rows fill six panels but for five lanes, where a stray value would be multiplied in.
    stray = mapped("transformer.wte.weight", lambda store, w: np.where(store(w) == 0, 1, store(w)))
    proof = prove(config, stray(mapping(config, PANELS)), "float32")
    assert [finding.tensor for finding in proof.problems] == ["transformer.wte.weight"]


def test_every_tensor_is_read_once_and_rounded_to_nearest(config, checkpoint):
    read = []
    checkpoint.read, inner = lambda name: read.append(name) or inner(name), checkpoint.read
    loaded = load_parameters(config, checkpoint, "float16", mapping(config, PANELS))
    assert sorted(read) == sorted(topology(config))
    gain = loaded.tensors["transformer.norm_f.weight"]
    assert np.array_equal(gain, checkpoint.arrays["transformer.norm_f.weight"].astype(np.float16))


def test_all_that_is_wrong_is_named_at_once(config, checkpoint):
    first, second, third, fourth, *rest = checkpoint.tensors
    checkpoint.tensors = (
        entry(second, shape=(7,)),
        entry(third, dtype="float16"),
        entry(fourth, file="two.bin"),
        fourth,
        entry(first, name="transformer.rotary.inv_freq"),
        *rest,
    )
    with pytest.raises(WeightMapError) as caught:
        load_parameters(config, checkpoint, "float16")
    error = caught.value
    assert error.missing == (f"{first.name}: expected {first.shape}",)
    assert error.unexpected == ("transformer.rotary.inv_freq: in one.bin",)
    assert error.misshapen == (f"{second.name}: expected {second.shape}, found (7,)",)
    assert error.mistyped == (f"{third.name}: expected bfloat16 as most tensors, found float16",)
    assert error.duplicated == (f"{fourth.name}: in two.bin and one.bin",)
    for name in (first.name, second.name, third.name, fourth.name, "inv_freq"):
        assert name in str(error)


def test_integers_are_no_weights(config, checkpoint):
    checkpoint.tensors = tuple(entry(t, dtype="int8") for t in checkpoint.tensors)
    with pytest.raises(WeightMapError) as caught:
        load_parameters(config, checkpoint, "float16")
    assert len(caught.value.mistyped) == len(topology(config))


@pytest.mark.parametrize("name", ["stale layer", "key norm forgotten"])
def test_loading_refuses_a_map_that_is_not_one_to_one(name, config, checkpoint):
    with pytest.raises(WeightMapError) as caught:
        load_parameters(config, checkpoint, "float16", MUTATIONS[name][0](mapping(config)))
    assert caught.value.unmapped


def test_loading_refuses_a_function_that_changes_the_shape(config, checkpoint):
    change = mapped(BLOCK + "norm_2.weight", lambda store, w: w[1:])
    with pytest.raises(WeightMapError) as caught:
        load_parameters(config, checkpoint, "float16", change(mapping(config)))
    assert caught.value.misshapen == (BLOCK + "norm_2.weight: expected (48,), mapped to (47,)",)
