"""Small synthetic checkpoints, made once a session, and the command line as a function."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

# One thread: these models are so small that more of them only wait for each other.
os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from cases.synthetic import make_checkpoint

_NUMBER = count()


def small_config(**changes: Any) -> dict[str, Any]:
    """A config of the kind that was released, only small: ALiBi, no bias, four times as wide."""
    attention = {"attn_type": "multihead_attention", "alibi": True} | changes.pop("attn", {})
    return {
        "model_type": "mpt",
        "d_model": 48,
        # Six heads: no power of two, so that the order of the slopes matters.
        "n_heads": 6,
        "n_layers": 2,
        "expansion_ratio": 4,
        "max_seq_len": 64,
        "vocab_size": 97,
        "no_bias": True,
        "attn_config": attention,
    } | changes


@dataclass(frozen=True)
class Outcome:
    """What one run of the command line came to."""

    code: int
    out: str
    err: str
    record: dict[str, Any] | None

    @property
    def report(self) -> dict[str, Any]:
        assert self.record is not None, f"no record was written: {self.err}"
        return self.record

    @property
    def first(self) -> dict[str, Any]:
        found = self.report["first_divergence"]
        assert found is not None, "there is no divergence"
        return found

    @property
    def diverging(self) -> list[dict[str, Any]]:
        return [tap for tap in self.report["taps"] if tap["verdict"] != "conforms"]


@pytest.fixture
def conform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs ``mpt-conform`` in this process, with its own ``main`` and a record on disk."""
    from harness.cli import main

    def run(*arguments: object) -> Outcome:
        file = tmp_path / f"record-{next(_NUMBER)}.json"
        words = [str(argument) for argument in arguments]
        if words[0] == "check" and "--diagnose" not in words:
            # What a divergence looks like takes longer than to see it; tests of it ask for it.
            words.append("--no-diagnose")
        monkeypatch.setattr(sys, "argv", ["mpt-conform", *words, "--json", str(file)])
        with pytest.raises(SystemExit) as stopped:
            main()
        written = capsys.readouterr()
        record = json.loads(file.read_text()) if file.exists() else None
        assert isinstance(stopped.value.code, int)
        return Outcome(stopped.value.code, written.out, written.err, record)

    return run


@pytest.fixture
def made() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Makes a factory known under a name for ``--subject``."""
    names: list[str] = []

    def register(factory: Callable[..., Any]) -> str:
        module = ModuleType(f"made_for_a_test_{next(_NUMBER)}")
        module.load = factory  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        names.append(module.__name__)
        return f"{module.__name__}:load"

    yield register
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in bfloat16, in two shards."""
    directory = tmp_path_factory.mktemp("small")
    return make_checkpoint(directory, small_config(), seed=0, dtype="bfloat16", shards=2)


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of 19 tokens, below every vocabulary used here."""
    file = tmp_path_factory.mktemp("prompts") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 97, (2, 19)))
    return file


def change_config(checkpoint: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same weights under another config.json."""
    target.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="session")
def config_of() -> Callable[..., dict[str, Any]]:
    return small_config


@pytest.fixture(scope="session")
def with_config() -> Callable[..., Path]:
    return change_config
