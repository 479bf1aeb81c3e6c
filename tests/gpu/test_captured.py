"""Decode steps as one CUDA graph give the bits of the calls, at every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cases.synthetic import make_checkpoint
from harness.subjects.relax import load

pytestmark = pytest.mark.gpu

CONFIG = {
    "model_type": "mpt",
    "d_model": 128,
    "n_heads": 2,
    "n_layers": 2,
    "expansion_ratio": 4,
    "max_seq_len": 256,
    "vocab_size": 512,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("captured") / "checkpoint"
    make_checkpoint(path, CONFIG, seed=3, dtype="float16")
    return load(path, dtype="float16", target="cuda").decoder


@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_gives_the_bits_of_the_calls(decoder: Any, batch: int) -> None:
    from relax_impl.kernels.cuda.captured import CapturedStep

    ids = np.random.default_rng(batch).integers(0, 512, (batch, 60)).astype(np.int32)
    _, called = decoder.prefill(ids[:, :30])
    called.reserve(60)
    replayed = called.fork()
    step = CapturedStep(decoder.model, replayed)
    for at in range(30, 60):
        expected = decoder.extend(called, ids[:, at : at + 1])[:, 0]
        assert np.array_equal(step(replayed, ids[:, at]), expected)
        assert np.array_equal(called.lengths, replayed.lengths)


def test_a_cache_that_is_full_is_refused(decoder: Any) -> None:
    from relax_impl.kernels.cuda.captured import CapturedStep

    _, cache = decoder.prefill(np.zeros((1, 15), np.int32))
    step = CapturedStep(decoder.model, cache)
    step(cache, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="room for a token"):
        step(cache, np.zeros(1, np.int32))


def test_the_decoder_replays_and_gives_the_bits_of_calls(decoder: Any) -> None:
    ids = np.random.default_rng(9).integers(0, 512, (2, 60)).astype(np.int32)
    _, called = decoder.prefill(ids[:, :13])
    _, replayed = decoder.prefill(ids[:, :13])
    # Over room that is used up, and made, twice.
    for at in range(13, 60):
        expected = decoder.extend(called, ids[:, at : at + 1])[:, 0]
        assert np.array_equal(decoder.decode(replayed, ids[:, at]), expected)
    assert replayed.step is not None and replayed.step.serves(replayed)
    # A copy takes a step of its own, and a roll-back takes the same.
    fork = replayed.fork()
    called.truncate([40, 30])
    fork.truncate([40, 30])
    for at in range(3):
        expected = decoder.extend(called, ids[:, at : at + 1])[:, 0]
        assert np.array_equal(decoder.decode(fork, ids[:, at]), expected)
    assert np.array_equal(replayed.lengths, [60, 60])
