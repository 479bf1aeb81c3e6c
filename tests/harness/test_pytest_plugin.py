"""``pytest --conform-target``: items come by themselves, say all that one needs, and share."""

from __future__ import annotations

import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cases.synthetic import make_checkpoint
from harness.ledger.store import Ledger

ROOT = Path(__file__).parents[2]
OWN = "examples.own_mpt:load"
CHAPTERS = ("tensors", "ends", "alibi", "layer-0", "layer-1", "deployed", "coverage")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, small_config: dict[str, Any]) -> Path:
    """A checkpoint, made before pytester looks: it forgets modules, and torch loads only once."""
    return make_checkpoint(tmp_path_factory.mktemp("plugin"), small_config, seed=3, dtype="float32")


@pytest.fixture
def session(tiny: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs pytest with the plugin on a small checkpoint, elsewhere."""
    shutil.copytree(tiny, pytester.path / "tiny")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    loaded = any(
        entry.value == "harness.pytest_plugin" for entry in metadata.entry_points(group="pytest11")
    )
    how = [] if loaded else ["-p", "harness.pytest_plugin"]

    def run(subject: str, *words: str) -> pytest.RunResult:
        options = ["--conform-checkpoint", "tiny", "--conform-subject", subject]
        return pytester.runpytest_subprocess(*how, *options, *words)

    return run


def test_the_plugin_is_registered():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["pytest11"] == {"conform": "harness.pytest_plugin"}


def test_without_the_option_nothing_is_added(session):
    assert session(OWN).ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_workers_share_one_check_and_one_run(session, pytester):
    dtypes = ("--conform-dtype", "float16", "--conform-dtype", "bfloat16")
    words = ("--conform-target", "llvm", *dtypes, "--conform-ledger", "l.db", "-n", "2", "-v")
    result = session(OWN, *words)
    result.assert_outcomes(passed=2 * len(CHAPTERS))
    for chapter in CHAPTERS:
        result.stdout.fnmatch_lines([f"*PASSED*conform?llvm-float16-{chapter}]*"])
    with Ledger.open(pytester.path / "l.db") as ledger:
        assert sorted(run.dtype for run in ledger.runs()) == ["bfloat16", "float16"]


def test_a_failure_prints_value_limit_margin_place_and_repro(session):
    # 1/m^2 in place of 2^-m.
    result = session("examples.own_mpt:load_faulty", "--conform-target", "llvm", "-k", "alibi")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, deselected=len(CHAPTERS) - 1)
    result.stdout.fnmatch_lines(
        [
            "alibi (alibi, case 'bias *'): * limit *, margin -* % *",
            "repeat with: mpt-conform check tiny --subject examples.own_mpt:load_faulty",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_device_that_is_not_there_is_not_proven(session, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = session("relax", "--conform-target", "cuda", "-k", "alibi")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["not proven: *cuda*"])


def test_the_module_is_light():
    """Every pytest in the environment loads it: it must not bring the frameworks along."""
    import subprocess

    code = (
        "import sys, pytest, harness.pytest_plugin;"
        "print(sorted({'torch', 'tvm', 'sqlalchemy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
