"""The pipelines in `examples/ci`: what they call is there, and the plain script really runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cases.synthetic import make_checkpoint
from harness.checkpoint.reader import Checkpoint
from harness.gate.policy import read_policy

ROOT = Path(__file__).parents[2]
CI = ROOT / "examples" / "ci"
CONFIG = {
    "model_type": "mpt",
    "d_model": 48,
    "n_layers": 1,
    "n_heads": 6,
    "vocab_size": 97,
    "max_seq_len": 32,
    "expansion_ratio": 4,
    "no_bias": True,
    "attn_config": {"alibi": True},
}


@pytest.mark.parametrize("name", ["gate.toml", "gate-gpu.toml"])
def test_the_policies_name_the_shipped_checkpoint(name):
    policy = read_policy(CI / name)
    assert len(policy.required) == 2
    for required in policy.required:
        assert required.path is not None
        assert Checkpoint.open(required.path).digest == required.cell.checkpoint


def test_the_workflow_runs_files_that_are_there():
    workflow = yaml.safe_load((CI / "conform.yml").read_text())
    job = workflow["jobs"]["gate"]
    rows = job["strategy"]["matrix"]["include"]
    assert {row["name"] for row in rows} == {"cpu", "gpu"}
    for row in rows:
        assert (ROOT / row["policy"]).is_file()
    said = " ".join(step.get("run", "") for step in job["steps"])
    assert "bash examples/ci/gate.sh" in said
    assert any("upload-artifact" in step.get("uses", "") for step in job["steps"])


@pytest.mark.parametrize(("target", "code"), [("llvm", 0), ("elsewhere", 3)])
def test_the_script_gates_and_publishes_whatever_the_outcome(tmp_path, target, code):
    digest = Checkpoint.open(
        make_checkpoint(tmp_path / "tiny", CONFIG, seed=3, dtype="float32")
    ).digest
    # Without a path no fresh run can be made.
    place = 'path = "tiny"' if target == "llvm" else ""
    (tmp_path / "gate.toml").write_text(
        f'schema = 1\n[[checkpoint]]\nname = "tiny"\n{place}\ndigest = "{digest}"\n'
        f'[[require]]\nsubject = "examples.own_mpt:load"\ntargets = ["{target}"]\n'
        'dtypes = ["float32"]\ncheckpoints = ["tiny"]\n[drift]\nanchor = "optional"\n'
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "mpt-conform"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from harness.cli import main; main()" "$@"\n'
    )
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPT_CONFORM_COMMIT": "c" * 40,
    }
    environment.pop("GITHUB_STEP_SUMMARY", None)
    done = subprocess.run(
        ["bash", str(CI / "gate.sh"), "gate.toml", "1.0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == code, done.stdout + done.stderr
    out = tmp_path / "out"
    assert (out / "site" / "index.html").is_file() and (out / "gate.xml").is_file()
    assert ("pass: 1.0" if code == 0 else "NOT PROVEN: 1.0") in (out / "gate.md").read_text()
