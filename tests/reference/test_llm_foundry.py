"""The original itself, in float64: the reference computes the same from every field both know."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases.exposure import EXPOSURES, materialise
from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import Oracle
from harness.measure.paths import evaluate
from harness.subjects.protocol import Rounding
from reference.alibi import slopes
from reference.config import MPTConfig

pytestmark = pytest.mark.foundry

UNKNOWN = {
    "epsilon-1e-6": "layer_norm_epsilon is a field of transformers; the original has norm_eps",
    "block-7b": "the same fields as the trained checkpoint, at a size that float64 does not fit in",
}
KNOWN = tuple(name for name in EXPOSURES if name not in UNKNOWN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exposures")


def original(path: Path) -> Any:
    from harness.subjects.peers.llm_foundry import load_original

    return load_original(path, torch.float64)


def double_slopes(
    n_heads: int, alibi_bias_max: float = 8, device: Any = None, return_1d: bool = False
) -> torch.Tensor:
    """As the original's, whose own are float32 whatever the model is in, as is its bias."""
    values = slopes(n_heads, alibi_bias_max)
    return values if return_1d else values.view(1, n_heads, 1, 1)


@pytest.mark.parametrize("name", KNOWN)
def test_logits_are_the_originals(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = materialise(name, folder, "float32")
    model = original(path)
    attention = sys.modules["llmfoundry.models.layers.attention"]
    monkeypatch.setattr(attention, "gen_slopes", double_slopes)
    transformer = type(model.transformer)
    bias = transformer._attn_bias
    monkeypatch.setattr(
        transformer, "_attn_bias", lambda *a, **k: bias(*a, **{**k, "dtype": torch.float64})
    )
    opened = Checkpoint.open(path)
    config = MPTConfig.from_dict(opened.config)
    length = min(config.max_seq_len, max(EXPOSURES[name].lengths))
    ids = np.random.default_rng(8).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids).long()).logits
    assert theirs.dtype == torch.float64
    oracle = Oracle(config, opened.read, storage="float32", rounding=Rounding())
    ours, _ = evaluate(oracle, ids)
    # Every product of a layer sums at most so many terms, each rounded once.
    terms = config.n_layers * (3 * config.d_model + config.hidden_dim + length)
    limit = terms * np.finfo(np.float64).eps * np.abs(ours).max()
    assert np.abs(theirs.numpy() - ours).max() <= limit


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("heads", [*range(1, 13), 24, 32, 40])
def test_slopes_are_the_originals(heads: int, bias_max: int) -> None:
    from harness.subjects.peers.llm_foundry import modelling

    modelling()
    attention = sys.modules["llmfoundry.models.layers.attention"]
    theirs = attention.gen_slopes(heads, bias_max, return_1d=True).double()
    # An exponent of at most 16 in float32 is off by half of 2^-20, the power by as much times ln 2.
    assert (theirs / slopes(heads, bias_max) - 1).abs().max() <= 2.0**-20


def test_a_field_that_one_of_them_ignores_is_seen(folder: Path) -> None:
    """Whether this comparison can fail: the reference with another value of one field."""
    path = materialise("clip", folder, "float32")
    model = original(path)
    opened = Checkpoint.open(path)
    raw = {**opened.config, "attn_config": {**opened.config["attn_config"], "clip_qkv": None}}
    ids = np.arange(40, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    oracle = Oracle(MPTConfig.from_dict(raw), opened.read, storage="float32", rounding=Rounding())
    ours, _ = evaluate(oracle, ids)
    assert np.abs(theirs - ours).max() > 1e-3 * np.abs(ours).max()


def test_what_is_stood_in_for_does_not_hide_that_the_peer_is_installed() -> None:
    from harness.subjects.peers.llm_foundry import modelling
    from harness.subjects.peers.registry import PEERS

    modelling()
    assert PEERS["llm-foundry"].missing == ()
