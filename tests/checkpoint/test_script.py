"""The script at the top of the repository, from a plain checkout."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bfloat16_to_float16.py"


def run(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def source(write, tmp_path):
    weights = torch.tensor([1.0, 2.0**-30, 1.5 * 2.0**-24], dtype=torch.bfloat16)
    return write(tmp_path / "m", {"fine": torch.ones(2), "small": weights}, kind="pytorch")


def test_help(tmp_path):
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for part in ("MODEL_DIR", "dist/models/mpt-7b-instruct", "--weights-only", "exit status"):
        assert part in shown.stdout


def test_conversion(source, tmp_path):
    done = run(source, "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "small: 1 flushed to zero, 1 inexact of 3 elements" in done.stdout
    assert "fine" not in done.stdout
    assert "2 tensors, 5 elements: 1 flushed to zero, 1 inexact" in done.stdout
    assert "converting: " in done.stderr
    assert "\x1b" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["totals"] == {"overflowed": 0, "flushed": 1, "inexact": 1, "not_finite": 0}
    assert [t["name"] for t in report["affected"]] == ["small"]
    assert (tmp_path / "m-float16" / "model.safetensors").is_file()


def test_the_default_directory(write, tmp_path):
    write(tmp_path / "dist" / "models" / "mpt-7b-instruct", {"a": torch.ones(2)})
    assert run(cwd=tmp_path).returncode == 0
    assert (tmp_path / "dist" / "models" / "mpt-7b-instruct-float16" / "config.json").is_file()


def test_bad_input_is_one_sentence(tmp_path):
    done = run("absent", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: absent: the directory does not exist"]
    assert os.listdir(tmp_path) == []


def test_overflow(write, tmp_path):
    source = write(tmp_path / "m", {"a": torch.tensor([1e5])})
    done = run(source, "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "a: 1 overflowed to infinity of 1 elements" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["overflowed"] == 1
    assert not (tmp_path / "m-float16").exists()
    assert run(source, "--allow-overflow", cwd=tmp_path).returncode == 0
    assert (tmp_path / "m-float16").is_dir()


def test_a_second_run_needs_force(source, tmp_path):
    assert run(source, cwd=tmp_path).returncode == 0
    assert run(source, cwd=tmp_path).returncode == 2
    assert run(source, "--force", cwd=tmp_path).returncode == 0


def test_a_report_that_cannot_be_written(source, tmp_path):
    done = run(source, "--json", "absent/report.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "absent/report.json" in done.stderr.splitlines()[-1]


def test_a_bar_on_a_terminal(source, tmp_path):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, str(SCRIPT), str(source)]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as p:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:
            pass  # a terminal's end, once the process is gone
    os.close(ours)
    assert p.returncode == 0
    assert b"\x1b[" in shown
    assert b"converting" in shown
