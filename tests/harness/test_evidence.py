"""Beside a verdict stands how good the gate is that gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.certify import certificate
from harness.certify.campaign import factors_digest
from harness.certify.certificate import certify, content_digest
from harness.certify.results import FaultRun, HealthyRun

RUNS = [
    FaultRun("caught", None, "mask", "trained", False, "diverges", True, 0, "a", "a", "local", 9.0),
    FaultRun("missed", None, "mask", "trained", False, "conforms", False, 0, "a", "", "", None),
    HealthyRun("seed 1", "torch-cpu", "float16", 3, "conforms", "", 0.5),
    HealthyRun("seed 2", "torch-cpu", "float16", 4, "diverges", "a", 1.5),
]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a certificate where the package's own would lie."""

    def write(factors: str) -> Path:
        made = certify(
            RUNS, target="llvm", dtype="float16", factors=factors, stamp="", sample="",
            versions={}, seeds=None,
        )  # fmt: skip
        path = tmp_path / "certificate-llvm.json"
        path.write_bytes(msgspec.json.encode(replace(made, digest=content_digest(made))))
        monkeypatch.setattr(certificate, "committed", lambda target="llvm": path)
        return path

    return write


def test_a_verdict_says_what_the_gate_catches(
    written: Callable[..., Path], conform: Callable[..., Any], checkpoint: Path, ids: Path
) -> None:
    written(factors_digest())
    run = conform("check", checkpoint, "--prompts", ids, "--subject", "torch")
    known = run.report["evidence"]
    assert (known["caught"], known["planted"]) == (1, 2)
    assert (known["flagged"], known["healthy"]) == (1, 7)
    assert known["current"] is True
    assert "this gate catches 1 of 2 planted faults (llvm, float16)" in run.out
    assert "flagged 1 of 7 healthy inputs" in run.out


def test_a_certificate_of_other_factors_is_called_one(
    written: Callable[..., Path], conform: Callable[..., Any], checkpoint: Path, ids: Path
) -> None:
    written("0" * 64)
    run = conform("check", checkpoint, "--prompts", ids, "--subject", "torch")
    assert run.report["evidence"]["current"] is False
    assert "of other factors than these" in run.out


def test_without_a_certificate_nothing_is_claimed(
    written: Callable[..., Path], conform: Callable[..., Any], checkpoint: Path, ids: Path
) -> None:
    written(factors_digest()).unlink()
    run = conform("check", checkpoint, "--prompts", ids, "--subject", "torch")
    assert run.report["evidence"] is None
    assert "no certificate for llvm" in run.out
