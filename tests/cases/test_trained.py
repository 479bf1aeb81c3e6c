"""The trained checkpoint does what its report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoTokenizer, MptForCausalLM

import cases
from cases.scripts import report_tiny
from cases.topology import tensor_shapes

ROOT = Path(cases.__file__).parent
DIRECTORY = ROOT / "checkpoints" / "mpt-tiny-english"
HELD_OUT = ROOT / "prompts" / "held-out" / "persuasion.txt"
REPORT: dict[str, Any] = json.loads((DIRECTORY / "report.json").read_text())
CONFIG: dict[str, Any] = json.loads((DIRECTORY / "config.json").read_text())
WINDOWS = 6


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    """The first windows of the held-out text, (WINDOWS, 257)."""
    ids = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).encode(HELD_OUT.read_text()).ids
    assert len(ids) == REPORT["held_out_tokens"]
    return report_tiny.windows(torch.tensor(ids), REPORT["window"])[:WINDOWS]


def hub_losses(batch: torch.Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    model = MptForCausalLM.from_pretrained(DIRECTORY, dtype=dtype).eval()
    with torch.no_grad():
        rows = [
            functional.cross_entropy(model(row[None, :-1]).logits[0].double(), row[1:])
            for row in batch
        ]
    return np.array([float(row) for row in rows])


def test_layout_is_that_of_the_hub() -> None:
    files = {file.name for file in DIRECTORY.iterdir()}
    shards = {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    assert shards < files
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < files
    index = json.loads((DIRECTORY / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == 2 * REPORT["parameters"]
    assert list(index["weight_map"]) == list(tensor_shapes(CONFIG))
    for shard in shards:
        for name, value in torch.load(DIRECTORY / shard, weights_only=True).items():
            assert index["weight_map"][name] == shard
            assert value.dtype == torch.bfloat16
            assert tuple(value.shape) == tensor_shapes(CONFIG)[name]


def test_config_has_the_fields_of_the_published_one() -> None:
    published = json.loads((ROOT / "configs" / "mpt-7b-instruct.json").read_text())
    assert list(CONFIG) == list(published)
    sizes = {"d_model", "max_seq_len", "n_heads", "n_layers", "tokenizer_name", "vocab_size"}
    assert {name for name in CONFIG if CONFIG[name] != published[name]} == sizes


def test_transformers_gives_the_reported_loss(batch: torch.Tensor) -> None:
    """float32 against the report's float64.

    Rounding errors are proportional to the unit roundoff. A bfloat16 run of the same weights shows
    the factor, with u = 2^-8 for every stored activation; float32 has u = 2^-24, but there the
    sums count too, which bfloat16 runs keep in float32: at most one more rounding for each of the
    longest reduction's terms (the MLP's 4 d_model).
    """
    reported = np.array(REPORT["loss_by_window"][:WINDOWS])
    coarse = np.abs(hub_losses(batch, torch.bfloat16) - reported).max()
    longest = CONFIG["expansion_ratio"] * CONFIG["d_model"]
    fine = np.abs(hub_losses(batch, torch.float32) - reported).max()
    assert 0 < fine <= coarse * 2.0 ** (8 - 24) * longest


def test_the_report_is_of_these_weights(batch: torch.Tensor) -> None:
    """float64 again: other summation orders only, at most u = 2^-53 for each of the longest
    reduction's terms, relative, through 2 sub-modules a layer and the head."""
    model = report_tiny.load(DIRECTORY)
    longest = CONFIG["expansion_ratio"] * CONFIG["d_model"]
    relative = (2 * CONFIG["n_layers"] + 1) * longest * 2.0**-53
    # The loss is a difference of numbers as large as the logits are.
    bound = relative * REPORT["largest_activation"]["logits"]
    found = np.array(report_tiny.losses(model, batch[:2]))
    assert np.abs(found - REPORT["loss_by_window"][:2]).max() <= bound


def test_it_is_trained() -> None:
    assert REPORT["loss"] < REPORT["unigram_loss"] / 2
    assert sum(REPORT["loss_by_window"]) / len(REPORT["loss_by_window"]) == REPORT["loss"]


def test_faults_of_alibi_hurt(batch: torch.Tensor) -> None:
    """Each wrong rule costs more than the windows' own losses are spread (standard error)."""
    model = report_tiny.load(DIRECTORY)
    right = np.array(REPORT["loss_by_window"][:2])
    spread = np.std(REPORT["loss_by_window"]) / np.sqrt(len(REPORT["loss_by_window"]))
    for rule in ("none", "inverse-square", "not-interleaved"):
        wrong = np.array(report_tiny.losses(model, batch[:2], rule))
        assert (wrong - right).min() > 3 * spread, rule
        assert REPORT["loss_by_slope_rule"][rule] > REPORT["loss"] + 3 * spread, rule


def test_traps_are_not_set() -> None:
    """Gammas away from 1, an embedding that is small, an arg max that is not the input token."""
    for name, gamma in REPORT["gammas"].items():
        assert gamma["std"] > 0.1, name
        assert gamma["max"] > gamma["mean"] + 3 * gamma["std"], name
    assert REPORT["embedding_std"] < 0.2
    assert REPORT["argmax_is_the_input"] < 0.05 < 0.25 < REPORT["argmax_is_right"]
    assert CONFIG["n_heads"] & (CONFIG["n_heads"] - 1)


def test_tokenizer_knows_every_byte_and_loads_in_transformers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    text = (ROOT / "prompts" / "every-byte.txt").read_bytes().decode()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < CONFIG["vocab_size"] == len(tokenizer)


def test_it_stays_small() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) < 4.5e6
