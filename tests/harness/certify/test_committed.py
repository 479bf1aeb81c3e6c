"""The committed certificate is the one of the gate that is shipped."""

from __future__ import annotations

from pathlib import Path

from harness.certify.campaign import factors_digest
from harness.certify.certificate import committed, read_certificate
from harness.certify.lines import table
from harness.faults.library import library


def test_renewed_limits_come_with_a_renewed_list_of_what_is_caught() -> None:
    found = read_certificate(committed().read_bytes())
    assert found.factors == factors_digest(), (
        "factors.json has changed: run `mpt-conform certify --against "
        "harness/certify/certificate-llvm.json --json ...` and commit what it writes"
    )
    assert found.change is None or found.change.lost == ()


def test_it_is_of_the_whole_library() -> None:
    found = read_certificate(committed().read_bytes())
    assert found.sample == ""
    names = {name for name, fault in library().items() if not fault.equivalent}
    assert set(found.killed) | {survivor.fault for survivor in found.survivors} == names
    assert found.healthy is not None


def test_it_shows_what_is_promised() -> None:
    found = read_certificate(committed().read_bytes())
    assert found.healthy is not None
    assert found.total.full.percent >= 97.0
    assert found.total.leave_one_out.percent >= 93.0
    for area, rate in found.kill.items():
        assert rate.full.percent >= (100.0 if area in ("weights", "config") else 90.0), area
    assert (found.healthy.flagged, found.equivalent.count) == (0, 0)
    assert found.healthy.inputs >= 3000
    assert found.accuracy.layer.percent >= 99.0
    assert found.accuracy.tap.percent >= 95.0
    assert found.accuracy.named_or_alike.percent >= 90.0
    assert found.accuracy.held_out.percent >= 95.0


def test_the_readme_shows_its_table() -> None:
    found = read_certificate(committed().read_bytes())
    readme = Path(__file__).parents[3].joinpath("README.md").read_text()
    assert table(found) in readme, "run `mpt-conform certificate --markdown` and paste it"
