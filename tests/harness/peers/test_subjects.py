"""Peers that need no package of their own, through the gate: what is right and what is ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.measure.run import Case
from harness.peers.ask import ask, place
from harness.peers.features import FEATURES
from harness.subjects.peers.registry import PEERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


def quiet(text: str) -> None:
    """Take a sentence and say nothing."""


@pytest.mark.peers
def test_transformers_conforms_on_the_base_config(folder: Path) -> None:
    found = ask("transformers", FEATURES["base"], "float32", folder, quiet)
    assert (found.state, found.reason) == ("conforms", "")
    assert found.top1 == found.positions == FEATURES["base"].length
    assert found.versions["transformers"]


def test_transformers_ignores_alibi_bias_max_and_is_found_out(folder: Path) -> None:
    found = ask("transformers", FEATURES["bias-max-16"], "float32", folder, quiet)
    assert (found.state, found.first) == ("diverges", "alibi")
    assert found.fault == "alibi-bias-max-ignored"


def test_transformers_refuses_an_integer_that_the_original_takes(folder: Path) -> None:
    found = ask("transformers", FEATURES["storywriter"], "float32", folder, quiet)
    assert found.state == "refuses"
    assert "clip_qkv" in found.reason


@pytest.mark.peers
@pytest.mark.parametrize("feature", ["left-padding", "cached-decode"])
def test_paths_of_transformers_hold(feature: str, folder: Path) -> None:
    assert ask("transformers", FEATURES[feature], "float32", folder, quiet).state == "conforms"


def test_what_cannot_be_asked_is_not_supported(folder: Path) -> None:
    found = ask("torch-export", FEATURES["cached-decode"], "float32", folder, quiet)
    assert (found.state, found.reason) == ("not supported", "the exported graph has no cache")


@pytest.mark.peers
@pytest.mark.parametrize("name", ["torch-export", "tvm-importer"])
def test_graph_of_a_block_has_the_taps_of_the_model(name: str, folder: Path) -> None:
    """One block of an importer against the same block that is not compiled."""
    checkpoint, prompts = place(FEATURES["heads-1"], folder)
    case = Case("ids", np.load(prompts / "ids.npy"))
    plain = PEERS["transformers"].load(checkpoint, dtype="float32", target="llvm")
    made = PEERS[name].load(checkpoint, dtype="float32", target="llvm")
    hidden = plain.embed(case.ids)["transformer.wte"]
    expected, found = plain.block(0, hidden), made.block(0, hidden)
    assert list(found) == list(expected)
    for tap, value in expected.items():
        # Sums of at most 32 terms in float32, grouped in another way.
        limit = 4 * 32 * np.finfo(np.float32).eps * np.abs(value).max()
        assert np.abs(found[tap] - value).max() <= limit, tap
