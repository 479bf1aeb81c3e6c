"""What goes into a model, and what is refused at its door."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from relax_impl.compile import compile_model
from relax_impl.config import MPTConfig
from relax_impl.layout import ROWS
from relax_impl.loader import load_parameters, mapping
from relax_impl.runtime import InputError, Model

HIDDEN = np.zeros((1, 2, 48), np.float32)
HEADS = np.zeros((1, 2, 6, 8), np.float32)


@pytest.fixture(scope="module")
def model(raw, build):
    return build(raw({"alibi": False})).model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.forward([[0.5]]), "ids: expected integers, found float64"),
        (lambda m: m.forward([1, 2]), r"ids: expected shape \(batch, sequence\), found \(2,\)"),
        (lambda m: m.forward(np.zeros((1, 0), int)), r"found \(1, 0\)"),
        (lambda m: m.forward([[0, 91]]), "ids: expected 0..90, found 0..91"),
        (lambda m: m.embed([[-1, 3]]), "ids: expected 0..90, found -1..3"),
        (lambda m: m.forward([[0] * 65]), "ids: expected at most 64 positions"),
        (lambda m: m.block(2, HIDDEN), "layer: expected 0..1, found 2"),
        (lambda m: m.block(-1, HIDDEN), "layer: expected 0..1, found -1"),
        (lambda m: m.block(0, HIDDEN[0]), r"hidden: expected shape \(any, any, 48\)"),
        (lambda m: m.head(HIDDEN[..., 1:]), r"found \(1, 2, 47\)"),
        (lambda m: m.head(HIDDEN.astype("f8")), "hidden: expected an array of float32, found flo"),
        (lambda m: m.head([[[0.0]]]), "hidden: expected an array of float32, found list"),
        (lambda m: m.attend(HEADS, HEADS[:, :1], HEADS[:, :1]), "q: expected no more positions"),
        (lambda m: m.attend(HEADS, HEADS, HEADS[:, :1]), r"v: expected shape \(1, 2, 6, 8\)"),
        (lambda m: m.attend(HEADS[:, :, 1:], HEADS, HEADS), "q: expected shape"),
    ],
)
def test_wrong_arrays_are_named(call, message, model):
    with pytest.raises(InputError, match=message):
        call(model)


def test_views_and_other_integers_are_welcome(model):
    ids = np.arange(40).reshape(5, 8)
    expected = model.forward(np.ascontiguousarray(ids.T))
    for dtype in (np.int32, np.uint8, np.int64):
        assert np.array_equal(model.forward(ids.astype(dtype).T), expected)
    hidden = model.embed(ids)["hidden"]
    backwards = model.block(0, hidden[::-1])["output"]
    assert np.array_equal(backwards, model.block(0, hidden)["output"][::-1])


def test_parameters_must_be_made_for_the_library(raw, make_checkpoint):
    config = MPTConfig.from_dict(raw())
    checkpoint = make_checkpoint(config, "float32")
    library = compile_model(config, "float32")
    good = load_parameters(config, checkpoint, "float32", mapping(config, library.layout))
    Model(library, good)
    for wrong, field in [
        (load_parameters(config, checkpoint, "float32"), "layout"),
        (dataclasses.replace(good, dtype="float16"), "dtype"),
        (dataclasses.replace(good, config=MPTConfig.from_dict(raw(n_layers=1))), "config"),
    ]:
        with pytest.raises(InputError, match=f"expected {field} "):
            Model(library, wrong)
    assert load_parameters(config, checkpoint, "float32").layout == ROWS
    with pytest.raises(InputError, match="no cuda device"):
        Model(dataclasses.replace(library, executable=None, target="cuda"), good)
