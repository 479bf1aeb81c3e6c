"""Faults planted through `Operations`, one per layer of one model, each found in its step only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tvm.relax.frontend.nn import op

from relax_impl import operations
from relax_impl.attention import cast
from relax_impl.kernels.cpu import FAST
from relax_impl.layout import ROWS
from relax_impl.operations import PLAIN


def attention(base, **pieces):
    return dataclasses.replace(base, attention=dataclasses.replace(base.attention, **pieces))


def reciprocal_squares(config):
    return (1 / np.arange(1, config.n_heads + 1) ** 2).astype(np.float32)


def not_interleaved(config):
    return np.exp2(-8 / 8 * np.arange(1, config.n_heads + 1)).astype(np.float32)


def other_epsilon(base):
    def norm(x, layer):
        layer.epsilon, before = 1e-3, layer.epsilon
        result = base.norm(x, layer)
        layer.epsilon = before
        return result

    return dataclasses.replace(base, norm=norm)


def rms(base):
    def norm(x, layer):
        layer.is_rms = True
        result = base.norm(x, layer)
        layer.is_rms = False
        return result

    return dataclasses.replace(base, norm=norm)


def parallel_residual(base):
    def block(ops, layer, hidden, tap):
        norm_2 = ops.norm(hidden, layer.norm_2)

        def norm(x, which):
            return norm_2 if which is layer.norm_2 else ops.norm(x, which)

        return operations.block(dataclasses.replace(ops, norm=norm), layer, hidden, tap)

    return dataclasses.replace(base, block=block)


def narrow_accumulator(x, layer):
    return op.matmul(x, op.permute_dims(layer.matrix()))


def swapped(qkv, config):
    q, k, v = operations.split(qkv, config)
    return k, q, v


LINEAR = {"attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"}
NORMS = {"norm_1", "norm_2"}
FAULTS = {
    "healthy": (lambda b: b, set()),
    "1/m^2": (lambda b: dataclasses.replace(b, slopes=reciprocal_squares), {"attn.context"}),
    "order of slopes": (lambda b: dataclasses.replace(b, slopes=not_interleaved), {"attn.context"}),
    "bias sign": (lambda b: attention(b, bias=lambda s, d: s * (0.0 - d)), {"attn.context"}),
    "no bias": (lambda b: attention(b, bias=lambda s, d: d * 0.0), {"attn.context"}),
    "no mask": (lambda b: attention(b, visible=None), {"attn.context"}),
    "self masked": (lambda b: attention(b, visible=lambda q, k: k < q), {"attn.context"}),
    "future seen": (lambda b: attention(b, visible=lambda q, k: k <= q + 1), {"attn.context"}),
    "scale": (lambda b: attention(b, scale=lambda c: c.d_model**-0.5), {"attn.context"}),
    "float16 scores": (
        lambda b: attention(b, score=lambda s: cast(cast(s, "float16"), "float32")),
        {"attn.context"},
    ),
    "k and q": (lambda b: dataclasses.replace(b, split=swapped), {"attn.context"}),
    "no clip": (lambda b: dataclasses.replace(b, clip=lambda x, limit: x), {"attn.Wqkv"}),
    "tanh": (
        lambda b: dataclasses.replace(b, activation=lambda x: op.gelu(x, "tanh")),
        {"ffn.act"},
    ),
    "relu": (lambda b: dataclasses.replace(b, activation=op.relu), {"ffn.act"}),
    "half-rounded GELU": (lambda b: dataclasses.replace(b, activation=op.gelu), {"ffn.act"}),
    "epsilon": (other_epsilon, NORMS),
    "RMS": (rms, NORMS),
    "parallel residual": (parallel_residual, {"norm_2"}),
    "float16 accumulator": (lambda b: dataclasses.replace(b, linear=narrow_accumulator), LINEAR),
    "no residual": (
        lambda b: dataclasses.replace(b, residual=lambda x, update: update),
        {"attn.residual", "output"},
    ),
}


@pytest.mark.parametrize("name", ["FAST", "PLAIN"])
def test_every_fault_shows_in_its_step_and_nowhere_else(name, raw, build):
    base = {"FAST": FAST, "PLAIN": PLAIN}[name]
    layers = [plant(base) for plant, _ in FAULTS.values()]
    config = raw({"clip_qkv": 1.0}, n_layers=len(layers))
    built = build(config, "float16", lambda n: layers[n] if 0 <= n < len(layers) else base)
    assert built.model.library.variants == tuple(range(len(layers)))
    hidden = 0.05 * np.random.default_rng(0).standard_normal((2, 50, 48))
    hidden = hidden.astype(np.float16)
    found = {}
    for layer, fault in enumerate(FAULTS):
        taps = built.model.block(layer, hidden)
        bounds = built.steps.block(layer, hidden, taps)
        found[fault] = {step for step, bound in bounds.items() if bound.excess(taps[step]) > 1}
    assert found == {fault: steps for fault, (_, steps) in FAULTS.items()}


def test_only_distinct_operations_are_compiled_and_forward_has_them_all(raw, build):
    faulty = dataclasses.replace(FAST, activation=op.relu)
    built = build(raw(n_layers=4), "float16", lambda layer: faulty if layer == 2 else FAST)
    library = built.model.library
    assert library.variants == (0, 0, 1, 0)
    names = {"embed", "head", "forward", "extend", "last", "block", "attend"}
    names |= {"block_1", "attend_1"}
    assert set(library.functions) == names
    ids = np.random.default_rng(0).integers(0, 91, (2, 9))
    hidden = built.model.embed(ids)["hidden"]
    for layer in range(4):
        hidden = built.model.block(layer, hidden)["output"]
    assert np.array_equal(built.model.head(hidden)["logits"], built.model.forward(ids))


def test_the_ends_have_operations_too(raw, build):
    def first_row(ids, table):
        return operations.embed(ids * 0, table)

    broken = dataclasses.replace(FAST, embed=first_row)
    loud = dataclasses.replace(FAST, unembed=lambda h, t, s: FAST.unembed(h, t, 2.0))
    built = build(raw(), "float32", lambda layer: {-1: broken, 2: loud}.get(layer, FAST))
    healthy = build(raw(), "float32")
    ids = np.array([[3, 4, 5]])
    embedded = built.model.embed(ids)["hidden"]
    assert np.array_equal(embedded, healthy.model.embed(ids * 0)["hidden"])
    assert np.array_equal(built.model.forward(ids), 2 * healthy.model.forward(ids * 0))


def test_layers_must_agree_on_the_layout(raw, build):
    mixed = dataclasses.replace(FAST, layout=ROWS)
    with pytest.raises(ValueError, match="one layout for all layers, found panels, rows"):
        build(raw(), "float32", lambda layer: mixed if layer == 1 else FAST)
