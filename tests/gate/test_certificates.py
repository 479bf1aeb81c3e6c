"""What the gate asks of a certificate: each way to fall short, and none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.certify.certificate import certify
from harness.certify.results import FaultRun, HealthyRun
from harness.gate.certificates import certificate_finding
from harness.gate.policy import Figures
from harness.ledger.identity import factors
from harness.report.files import to_json

RATIOS = {"local norm_1": 5.0}
FAULT = FaultRun(
    "a", None, "norm", "plain", False, "diverges", True, 0, "x", "x", "local", 5.0, RATIOS
)
HEALTHY = HealthyRun("w", "torch", "float16", 3, "conforms", "", 0.5)


def written(folder: Path, *, missed: int = 0, healthy: int = 3, **changes: object) -> Path:
    runs: list[FaultRun | HealthyRun] = [replace(FAULT, fault=f"f{at}") for at in range(4)]
    runs += [replace(FAULT, fault=f"m{at}", verdict="conforms") for at in range(missed)]
    runs += [replace(HEALTHY, weights=f"w{at}") for at in range(healthy)]
    fields: dict[str, object] = {"target": "llvm", "dtype": "float16", "factors": factors()}
    fields |= {"stamp": "s", "sample": "", "versions": {}, "seeds": (0, 3)}
    place = folder / "certificate.json"
    place.write_bytes(to_json(certify(runs, **(fields | changes))))  # type: ignore[arg-type]
    return place


def found(place: Path, **changes: object) -> tuple[str, str]:
    finding = certificate_finding(place, Figures(file="certificate.json", **changes))  # type: ignore[arg-type]
    return finding.state, finding.text


def test_a_certificate_that_is_good_enough_passes(tmp_path):
    # Of 3 sets of weights none raised an alarm: below 63.2 % at 95 %, 1 - 0.05 ** (1 / 3).
    assert found(written(tmp_path), false_alarm_percent=64)[0] == "pass"
    state, text = found(tmp_path / "certificate.json", false_alarm_percent=63)
    assert state == "fail" and "below 63 %" in text


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"missed": 1}, "fail", "4 of 5 faults caught, 100 % required"),
        ({"sample": "every 12th"}, "not-proven", "of a sample only"),
        ({"factors": "f" * 64}, "not-proven", "made with other factors"),
        ({"healthy": 0}, "not-proven", "ran no healthy subject"),
    ],
    ids=["missed", "sample", "factors", "healthy"],
)
def test_a_certificate_that_falls_short(tmp_path, changes, state, text):
    got = found(written(tmp_path, **changes), false_alarm_percent=100)
    assert got[0] == state and text in got[1]


def test_a_lower_rate_may_be_enough(tmp_path):
    assert found(written(tmp_path, missed=1), kill_percent=80)[0] == "pass"


def test_no_certificate_is_not_proven_and_a_changed_one_fails(tmp_path, gate, policy, ledger):
    more = '[certificate.llvm]\nfile = "certificate.json"'
    cell = ("relax", "llvm", "float16")
    ran = gate(policy(cell, more=more), ledger)
    assert ran.code == 3 and "No such file" in ran.findings()["certificate"]["text"]
    place = written(tmp_path)
    assert gate(policy(cell, more=more), ledger).code == 0
    place.write_bytes(place.read_bytes().replace(b'"count": 4', b'"count": 3', 1))
    ran = gate(policy(cell, more=more), ledger)
    assert ran.code == 1 and "is no certificate" in ran.findings()["certificate"]["text"]
