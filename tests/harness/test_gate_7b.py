"""The gate of full size at a small one, on the processor: all stages, and faults in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("more", "code", "stage"),
    [
        ((), 0, None),
        pytest.param(
            ("--fault", "decode-bias-absent", "--together", "2"), 1, "paths", marks=pytest.mark.long
        ),
        (("--seconds", "0"), 3, None),
    ],
)
def test_the_gate(more: tuple[str, ...], code: int, stage: str | None, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gate_7b.py"
    words = ["--tiny", "--target", "llvm", "--output", str(tmp_path), *more]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, str(script), *words], env=environment, check=False)
    assert run.returncode == code
    stages = json.loads((tmp_path / "gate.json").read_bytes())["stages"]
    assert set(stages) == {"logits", "blocks", "paths", "edge"}
    if code == 3:
        assert {one["verdict"] for one in stages.values()} == {"not-proven"}
    else:
        for name, one in stages.items():
            assert one["verdict"] == ("diverges" if name == stage else "conforms")
