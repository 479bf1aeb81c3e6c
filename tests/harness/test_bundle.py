"""Bundles: built by one process, used by another, and refused where they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cases.synthetic import make_checkpoint
from harness.cli import main
from relax_impl import index

CONFIG = {
    "model_type": "mpt",
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 1,
    "expansion_ratio": 2,
    "max_seq_len": 64,
    "vocab_size": 64,
    "no_bias": True,
    "attn_config": {"alibi": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "checkpoint"
    return make_checkpoint(path, CONFIG, seed=3, dtype="float16")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def conform(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["mpt-conform", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return run


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "model.bundle"
    words = ["build", str(checkpoint / "config.json"), "-o", str(path)]
    run = [sys.executable, "-c", "from harness.cli import main; main()", *words]
    subprocess.run(run, check=True)
    return path


def refused(conform, capsys, checkpoint: Path, bundle: Path, *more: object) -> str:
    assert conform("check", checkpoint, "--bundle", bundle, *more) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("mpt-conform: --bundle") and "\n" not in sentence
    return sentence


def test_a_bundle_is_judged_as_what_is_compiled_here(conform, checkpoint, bundle, tmp_path):
    records = [tmp_path / name for name in ("here.json", "there.json")]
    assert conform("check", checkpoint, "--json", records[0]) == 0
    assert conform("check", checkpoint, "--bundle", bundle, "--json", records[1]) == 0
    here, there = (json.loads(record.read_bytes()) for record in records)
    assert here["taps"] == there["taps"] and here["compared"] == there["compared"]
    assert f"--bundle {bundle}" in there["reproduce"]


def test_a_stale_bundle_is_refused(conform, capsys, checkpoint, bundle, tmp_path, monkeypatch):
    other = make_checkpoint(tmp_path / "other", CONFIG | {"n_heads": 4}, seed=3, dtype="float16")
    assert "config" in refused(conform, capsys, other, bundle)
    assert "dtype" in refused(conform, capsys, checkpoint, bundle, "--dtype", "float32")
    assert "kind" in refused(conform, capsys, checkpoint, bundle, "--target", "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(index, "sources", lambda: "0" * 64)
        assert "sources" in refused(conform, capsys, checkpoint, bundle)
    with monkeypatch.context() as patch:
        patch.setattr("relax_impl.bundle.tvm.__version__", "0.0")
        assert "tvm" in refused(conform, capsys, checkpoint, bundle)


def test_a_damaged_bundle_is_refused(conform, capsys, checkpoint, bundle, tmp_path):
    broken = tmp_path / "broken"
    content = bundle.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    assert "damaged" in refused(conform, capsys, checkpoint, broken)
    with zipfile.ZipFile(bundle) as whole, zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("bundle.json", whole.read("bundle.json"))
        library = bytearray(whole.read("library.so"))
        library[len(library) // 2] ^= 1
        archive.writestr("library.so", bytes(library))
    assert "digest" in refused(conform, capsys, checkpoint, broken)
    assert "damaged" in refused(conform, capsys, checkpoint, tmp_path / "none")


def test_a_fault_does_not_come_in_a_bundle(conform, capsys, checkpoint, bundle):
    options = ("--fault", "alibi-inverse-square")
    assert "without a fault" in refused(conform, capsys, checkpoint, bundle, *options)


@pytest.mark.cuda_build
def test_machine_code_is_made_without_a_device(checkpoint, tmp_path):
    path = tmp_path / "cuda.bundle"
    words = ["build", str(checkpoint), "-o", str(path), "--target", "cuda", "--arch", "sm_90a"]
    run = [sys.executable, "-c", "from harness.cli import main; main()", *words]
    subprocess.run(run, check=True)
    with zipfile.ZipFile(path) as archive:
        library = archive.read("library.so")
    # One ELF file is the library; the others are cubins of operators and of kernels.
    assert library.count(b"\x7fELF") >= 3
    assert b"mpt_past_" in library and b"__global__" not in library
