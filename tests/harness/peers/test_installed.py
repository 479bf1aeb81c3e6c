"""Peers with packages of their own: `tox -e peers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.peers.ask import ask
from harness.peers.features import FEATURES
from harness.subjects.peers.registry import PEERS

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


def quiet(text: str) -> None:
    """Take a sentence and say nothing."""


@pytest.mark.parametrize("name", ["ctranslate2", "onnxruntime", "openvino", "torch-compile"])
def test_peer_is_there_and_conforms_on_the_base_config(name: str, folder: Path) -> None:
    assert PEERS[name].missing == ()
    found = ask(name, FEATURES["base"], "float32", folder, quiet)
    assert (found.state, found.reason) == ("conforms", "")


@pytest.mark.parametrize(
    ("feature", "fault"),
    [
        ("bias-max-16", "alibi-bias-max-ignored"),
        ("clip", "clip-qkv-ignored"),
        ("softmax-scale", "softmax-scale-ignored"),
        ("logit-scale", "logit-scale-ignored"),
        ("storywriter", "alibi-bias-max-ignored and clip-qkv-ignored"),
    ],
)
def test_what_ctranslate2_ignores_is_named(feature: str, fault: str, folder: Path) -> None:
    found = ask("ctranslate2", FEATURES[feature], "float32", folder, quiet)
    assert (found.state, found.first, found.fault) == ("diverges", "logits", fault)


def test_onnxruntime_inherits_from_transformers(folder: Path) -> None:
    found = ask("onnxruntime", FEATURES["bias-max-16"], "float32", folder, quiet)
    assert (found.state, found.fault) == ("diverges", "alibi-bias-max-ignored")
    assert found.first == "transformer.blocks.0.attn.context"
