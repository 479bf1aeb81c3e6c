"""llama.cpp: its library is no Python package, so that it is asked for by a variable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.peers.ask import ask, place
from harness.peers.features import FEATURES
from harness.subjects.peers.registry import PEERS

pytestmark = pytest.mark.llama_cpp


def test_its_gelu_is_named(tmp_path: Path) -> None:
    found = ask("llama-cpp", FEATURES["base"], "float16", tmp_path, lambda text: None)
    assert (found.state, found.fault) == ("diverges", "gelu-tanh")
    assert found.first == "transformer.blocks.0.ffn.act"


def test_parts_are_the_whole(tmp_path: Path) -> None:
    """Models of one layer, one after another, give the bits of the whole model."""
    checkpoint, prompts = place(FEATURES["base"], tmp_path)
    ids = np.load(prompts / "ids.npy")
    subject = PEERS["llama-cpp"].load(checkpoint, dtype="float16", target="llvm")
    hidden = subject.embed(ids)["transformer.wte"]
    for layer in range(2):
        hidden = subject.block(layer, hidden)["output"]
    assert np.array_equal(subject.head(hidden)["logits"], subject.forward(ids))
