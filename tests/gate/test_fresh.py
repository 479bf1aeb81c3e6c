"""Fresh runs: really made, recorded with what the run page shows, and not made twice."""

from __future__ import annotations

import math

import pytest

from cases.synthetic import make_checkpoint
from harness.ledger.store import Ledger

OWN = "examples.own_mpt:load"


@pytest.fixture
def checkpoint(tmp_path, small_config):
    return make_checkpoint(tmp_path / "tiny", small_config, seed=3, dtype="float32")


def test_missing_runs_are_made_once(tmp_path, monkeypatch, gate, policy, runs, checkpoint):
    monkeypatch.setenv("MPT_CONFORM_COMMIT", "d" * 40)
    place = policy(
        (OWN, "llvm", "float16"),
        (OWN, "llvm", "bfloat16"),
        more='[runs]\ncommit = "same"\n[drift]\nanchor = "optional"',
    )
    place.write_text(place.read_text().replace('name = "tiny"', 'name = "tiny"\npath = "tiny"'))
    ledger = tmp_path / "fresh.db"
    ran = gate(place, ledger, "--fresh")
    assert ran.code == 0, ran.out
    with Ledger.open(ledger) as opened:
        made = opened.runs()
        details = opened.details(made[0].id)
    assert [run.dtype for run in made] == ["float16", "bfloat16"]
    assert {run.commit for run in made} == {"d" * 40}
    assert made[0].device == made[0].environment["cpu"] and made[0].factors and made[0].inputs
    # Slopes of 6 heads, as measured through the subject: 2^-2, -4, -6, -8, then -1, -3.
    slopes = {slope["head"]: slope for slope in details["slopes"]}
    assert [slopes[head]["expected"] for head in range(6)] == [
        2.0**-power for power in (2, 4, 6, 8, 1, 3)
    ]
    for slope in slopes.values():
        # float32 holds these powers of two and their multiples exactly.
        assert slope["measured"] == pytest.approx(slope["expected"], rel=2.0**-23)
    kl = [value for case in details["positions"] for _, value in case["kl"]]
    assert all(math.isfinite(value) for value in kl)
    assert len(details["tokens"]) == 12
    worst = [token["kl"] for token in details["tokens"]]
    assert worst == sorted(worst, reverse=True) and worst[0] == max(kl)
    report = {case["case"]: case["kl_max"] for case in details["report"]["logits"]}
    assert worst[0] == max(report.values())

    assert gate(place, ledger, "--fresh").code == 0
    with Ledger.open(ledger) as opened:
        assert opened.runs() == made


def test_a_device_that_is_not_there_leaves_a_gap(tmp_path, monkeypatch, gate, policy, checkpoint):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    place = policy(("relax", "cuda", "float16"))
    place.write_text(place.read_text().replace('name = "tiny"', 'name = "tiny"\npath = "tiny"'))
    ran = gate(place, tmp_path / "fresh.db", "--fresh")
    assert ran.code == 3
    assert (
        "not proven: " in ran.findings()["run"]["text"] and "cuda" in ran.findings()["run"]["text"]
    )


def test_another_checkpoint_under_the_name_is_refused(tmp_path, command, policy, checkpoint):
    place = policy((OWN, "llvm", "float16"), digest="9" * 64)
    place.write_text(place.read_text().replace('name = "tiny"', 'name = "tiny"\npath = "tiny"'))
    words = ("--release", "1", "--policy", place, "--ledger", tmp_path / "f.db", "--fresh")
    code, _, err = command("gate", *words)
    assert code == 2 and "is another checkpoint than the policy names" in err
