"""A command line in this process, and small checkpoints to use it on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass

import pytest

from cases.synthetic import make_checkpoint
from harness.cli import main

IDS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [5, 4, 3, 2, 1, 96, 95, 94, 93, 92, 91, 90]]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``mpt-conform`` as its entry point does; returns code, stdout and stderr."""

    def run(*words):
        if words[0] == "check" and "--diagnose" not in words:
            words += ("--no-diagnose",)
        monkeypatch.setattr(sys, "argv", ["mpt-conform", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Ran(stop.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory, small_config):
    """A float32 checkpoint of two layers; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("small"), small_config, seed=3, dtype="float32")


@pytest.fixture
def copied(small, tmp_path):
    """A copy of ``small`` to spoil."""
    return shutil.copytree(small, tmp_path / "copied")


@pytest.fixture(scope="session")
def config(small_config):
    return small_config


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.json"
    path.write_text(json.dumps(IDS))
    return path
