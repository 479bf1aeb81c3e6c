"""No pass without evidence: what looks like a proof and is none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.errors import BadInput
from harness.ledger.exchange import pin
from harness.ledger.store import Ledger

CELL = ("relax", "llvm", "float16")
ANY = '[runs]\nfactors = "any"\ncommit = "any"\n'


def change(ledger: Path, statement: str) -> None:
    with closing(sqlite3.connect(ledger)) as db:
        db.execute(statement)
        db.commit()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("fault", "alibi-inverse-square", "was of a planted fault"),
        ("reproduce", "mpt-conform check x --layers 0", "left out a part of the check (--layers)"),
        ("reproduce", "mpt-conform check x --max-tokens 1", "(--max-tokens)"),
    ],
)
def test_a_run_that_could_not_fail_does_not_speak(gate, policy, ledger, column, value, said):
    change(ledger, f"UPDATE conform_run SET {column} = '{value}'")
    ran = gate(policy(CELL), ledger)
    assert ran.code == 3 and said in ran.findings()["run"]["text"]


def test_prompts_of_ones_own_speak_where_the_policy_takes_them(gate, policy, ledger):
    change(ledger, "UPDATE conform_run SET reproduce = 'mpt-conform check x --prompts one.npy'")
    assert gate(policy(CELL, more=ANY), ledger).code == 0
    ran = gate(policy(CELL, more=ANY + 'prompts = "shipped"'), ledger)
    assert ran.code == 3 and "(--prompts)" in ran.findings()["run"]["text"]


def test_a_run_of_a_time_to_come_does_not_speak(gate, policy, ledger):
    change(ledger, "UPDATE conform_run SET created = '2099-01-01T00:00:00+00:00'")
    assert gate(policy(CELL, more=ANY), ledger).code == 0
    ran = gate(policy(CELL, more=ANY + "max_age_days = 30.0"), ledger)
    assert ran.code == 3 and "still to come" in ran.findings()["run"]["text"]


def test_a_run_of_other_limits_does_not_speak(gate, policy, ledger):
    change(ledger, "UPDATE conform_run SET factors = 'abcdef'")
    assert gate(policy(CELL), ledger).code == 0
    ran = gate(policy(CELL, more='[runs]\ncommit = "any"'), ledger)
    assert ran.code == 3 and "judged by other factors (abcdef)" in ran.findings()["run"]["text"]


def test_a_run_with_fewer_taps_than_its_anchor_proves_nothing(gate, policy, ledger):
    newest = "(SELECT id FROM conform_run WHERE subject = 'relax' AND dtype = 'float16' "
    newest += f"AND checkpoint = '{_checkpoint(ledger)}' ORDER BY created DESC, id DESC LIMIT 1)"
    change(ledger, f"DELETE FROM conform_value WHERE layer = 1 AND run = {newest}")
    ran = gate(policy(CELL), ledger)
    assert ran.code == 3 and "were not compared" in ran.findings()["anchor"]["text"]


def _checkpoint(ledger: Path) -> str:
    with Ledger.open(ledger) as opened:
        return opened.runs()[0].checkpoint


def test_waivers_do_not_replace_all_evidence(gate, policy, ledger, tmp_path):
    (tmp_path / "waivers").mkdir()
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    (tmp_path / "waivers" / "gap.toml").write_text(
        f'reason = "r"\nowner = "o"\nexpires = {tomorrow}\ncheck = "run"\nsubject = "relax"\n'
        'target = "cuda"\ndtype = "float16"\ncheckpoint = "tiny"\n'
    )
    ran = gate(policy(("relax", "cuda", "float16")), ledger)
    assert ran.code == 3 and "no required cell has a run" in " ".join(ran.out.split())
    assert ran.junit.get("errors") == "1" and len(ran.junit.findall("testcase/error")) == 1


def test_a_planted_fault_is_no_anchor(ledger):
    change(ledger, "UPDATE conform_run SET fault = 'x'")
    with Ledger.open(ledger) as opened:
        first = opened.runs()[0].id
    with pytest.raises(BadInput, match="a fault was planted"):
        pin(str(ledger), [first], reason="accepted", release="")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[budget]\nperplexity_increase_percent = nan", "budget: perplexity_increase_percent"),
        ("[budget]\nperplexity_increase_percent = inf", "is no figure"),
        ("[budget]\ntop1_beyond_ties = -1", "is no figure"),
        (ANY + "max_age_days = inf", "runs: max_age_days: is no figure"),
        (ANY + "max_age_days = nan", "runs: max_age_days: is no figure"),
        ('[certificate.llvm]\nfile = "c"\nkill_percent = nan', "llvm: kill_percent: is no figure"),
        ('[certificate.cuda]\nfile = "c"', "certificate.cuda: is of a target that nothing"),
        (f'[[checkpoint]]\nname = "tiny"\ndigest = "{"0" * 64}"', "names a checkpoint twice"),
    ],
)
def test_a_policy_that_nothing_can_miss_is_refused(command, policy, ledger, more, said):
    place = policy(CELL, more=more)
    code, out, err = command("gate", "--release", "1", "--policy", place, "--ledger", ledger)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err


def test_a_waiver_of_no_check_is_refused(command, policy, ledger, tmp_path):
    (tmp_path / "waivers").mkdir()
    (tmp_path / "waivers" / "a.toml").write_text(
        'reason = "r"\nowner = "o"\nexpires = 2099-01-01\ncheck = "verdit"\nsubject = "relax"\n'
        'target = "llvm"\ndtype = "float16"\ncheckpoint = "tiny"\n'
    )
    code, _, err = command("gate", "--release", "1", "--policy", policy(CELL), "--ledger", ledger)
    assert code == 2 and "check: names no check; expected run, verdict" in err


def test_any_reason_can_be_shown(gate, policy, ledger):
    # Brackets are no markup, and an escape sequence is nothing that XML can carry.
    change(ledger, "UPDATE conform_run SET verdict = 'diverges', reason = '[/a] ' || char(27)")
    ran = gate(policy(CELL), ledger)
    assert ran.code == 1 and "[/a]" in ran.out
    (failure,) = ran.junit.findall("testcase/failure")
    assert "[/a] \ufffd" in str(failure.text)
    assert ElementTree.tostring(ran.junit)


def test_a_gap_is_counted_once(gate, policy, ledger):
    ran = gate(policy(("relax", "cuda", "float16")), ledger)
    assert ran.code == 3 and "1 of 1 cells" in ran.out and ran.record["general"] == []
