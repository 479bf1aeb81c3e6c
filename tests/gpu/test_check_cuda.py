"""The whole job on a CUDA device: conforms as it is, and a planted fault is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cases.synthetic import make_checkpoint
from harness.cli import main

pytestmark = pytest.mark.gpu

CONFIG = {
    "model_type": "mpt",
    "d_model": 96,
    "n_heads": 6,
    "n_layers": 2,
    "expansion_ratio": 4,
    "max_seq_len": 256,
    "vocab_size": 509,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "checkpoint"
    return make_checkpoint(path, CONFIG, seed=11, dtype="float16")


def check(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mpt-conform", "check", "--target", "cuda", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_port_conforms(
    checkpoint: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    assert check(monkeypatch, str(checkpoint), "--dtype", dtype, "--json", str(record)) == 0
    report = json.loads(record.read_bytes())
    assert report["subject"]["name"] == "relax-cuda"
    for axis in report["compared"].values():
        assert axis["compared"] == axis["expected"]


def test_wrong_slopes_are_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    options = ("--fault", "alibi-inverse-square@1", "--json", str(record))
    assert check(monkeypatch, str(checkpoint), *options) == 1
    found = json.loads(record.read_bytes())["first_divergence"]
    assert (found["layer"], found["tap"]) == (1, "transformer.blocks.1.attn.context")
