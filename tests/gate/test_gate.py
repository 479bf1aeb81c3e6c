"""What blocks a release and what does not, through the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harness.ledger.exchange import pin
from harness.ledger.records import Entry
from harness.ledger.store import Ledger

BREAK = "alibi-inverse-square"
HEALTHY = ("relax", "llvm", "float16")
BROKEN = ("relax", "llvm", "bfloat16")
MISSING = ("relax", "cuda", "float16")
TODAY = datetime.now(UTC).date()


def waive(folder: Path, cell: tuple[str, str, str], check: str, expires: object) -> None:
    (folder / "waivers").mkdir(exist_ok=True)
    subject, target, dtype = cell
    (folder / "waivers" / f"{check}.toml").write_text(
        f'reason = "the vendor fixes it"\nowner = "release manager"\nexpires = {expires}\n'
        f'check = "{check}"\nsubject = "{subject}"\ntarget = "{target}"\ndtype = "{dtype}"\n'
        'checkpoint = "tiny"\n'
    )


def test_a_healthy_cell_passes(gate, policy, ledger):
    ran = gate(policy(HEALTHY), ledger)
    assert ran.code == 0, ran.out
    assert ran.out.startswith("pass: 1.0") and "1 of 1 cells" in ran.out
    assert ran.record["state"] == "pass"
    assert {f["state"] for f in ran.findings().values()} == {"pass"}
    (case,) = ran.junit
    assert case.get("name") == "relax llvm float16 tiny" and len(case) == 0
    assert "| relax llvm float16 tiny | ✅ pass |" in ran.markdown


def test_the_planted_break_blocks(gate, policy, ledger, runs):
    ran = gate(policy(HEALTHY, BROKEN), ledger)
    assert ran.code == 1
    assert "BLOCKED: 1.0" in ran.out
    found = ran.findings(1)
    assert found["verdict"]["state"] == "fail"
    assert f"diverges with planted fault {BREAK}" in found["verdict"]["text"]
    # It shows against the anchor and the baseline, too, and in what users see.
    assert {found[name]["state"] for name in ("anchor", "baseline")} == {"fail"}
    good, bad = ran.junit
    assert len(good) == 0
    (failure,) = bad
    assert failure.tag == "failure"
    assert failure.text is not None and "repeat with: mpt-conform check" in failure.text
    assert f"--fault {BREAK}" in failure.text
    assert "❌ BLOCKED" in ran.markdown and f"--fault {BREAK}" in ran.markdown


def test_a_missing_target_blocks_as_not_proven(gate, policy, ledger):
    ran = gate(policy(HEALTHY, MISSING), ledger)
    assert ran.code == 3
    assert ran.findings(1)["run"]["text"] == "not proven: no run of this cell"
    assert "NOT PROVEN" in ran.out
    (error,) = ran.junit[1]
    assert error.tag == "error" and "--target cuda" in (error.text or "")
    assert "❔ NOT PROVEN" in ran.markdown


def test_a_failure_outweighs_a_gap(gate, policy, ledger):
    assert gate(policy(MISSING, BROKEN), ledger).code == 1


def test_a_waiver_lets_a_gap_pass_and_shows_on_every_report(gate, policy, ledger, tmp_path):
    place = policy(HEALTHY, MISSING)
    waive(tmp_path, MISSING, "run", TODAY)
    ran = gate(place, ledger)
    assert ran.code == 0, ran.out
    assert ran.findings(1)["run"]["waived"] is True
    reports = (ran.out, ran.markdown, (ran.junit[1][0].text or ""), str(ran.record))
    for report in reports:
        text = " ".join(report.split())
        assert "the vendor fixes it" in text and "release manager" in text
        assert TODAY.isoformat() in text
    assert "(in use)" in " ".join(ran.out.split())


def test_an_expired_waiver_blocks(gate, policy, ledger, tmp_path):
    place = policy(HEALTHY, MISSING)
    waive(tmp_path, MISSING, "run", TODAY - timedelta(days=1))
    ran = gate(place, ledger)
    assert ran.code == 1
    assert (
        f"waiver run.toml expired on {TODAY - timedelta(days=1)}" in ran.findings(1)["run"]["text"]
    )
    assert ran.record["general"][0]["check"] == "waivers"
    assert ran.junit.findall("testcase/failure")


def test_an_expired_waiver_blocks_even_if_nothing_needs_it(gate, policy, ledger, tmp_path):
    place = policy(HEALTHY)
    waive(tmp_path, HEALTHY, "verdict", TODAY - timedelta(days=400))
    ran = gate(place, ledger)
    assert ran.code == 1 and "renew it with a reason, or remove it" in " ".join(ran.out.split())


def test_a_waiver_covers_the_finding_that_it_names_and_no_other(gate, policy, ledger, tmp_path):
    place = policy(BROKEN)
    waive(tmp_path, BROKEN, "verdict", TODAY)
    ran = gate(place, ledger)
    assert ran.code == 1
    assert ran.findings()["verdict"]["waived"] and not ran.findings()["anchor"]["waived"]


def rewrite(ledger: Path, **changes: object) -> Entry:
    """Write the newest healthy run again, as another one."""
    with Ledger.open(ledger, write=True) as opened:
        runs = [run for run in opened.runs() if (run.subject, run.target, run.dtype) == HEALTHY]
        last = [run for run in runs if run.checkpoint == runs[0].checkpoint][-1]
        fields = {
            **vars(last),
            "id": "20990101T000000-00000001",
            "created": "2099-01-01T00:00:00+00:00",
        }
        entry = Entry(
            type(last)(**{**fields, **changes}), opened.values([last.id])[last.id], {"report": {}}
        )
        opened.write(entry)
    return entry


def test_only_runs_of_the_released_commit_speak(gate, policy, ledger):
    place = policy(HEALTHY, more='[runs]\nfactors = "any"\ncommit = "same"')
    ran = gate(place, ledger, "--commit", "c" * 40)
    assert ran.code == 3
    assert "no run at commit cccccccccccc; 16 at others" in ran.findings()["run"]["text"]
    rewrite(ledger, commit="c" * 40)
    ran = gate(place, ledger, "--commit", "c" * 40)
    assert ran.code == 0, ran.out


def test_a_later_success_does_not_outvote_a_divergence_of_the_same_commit(gate, policy, ledger):
    place = policy(HEALTHY, more='[runs]\nfactors = "any"\ncommit = "same"')
    rewrite(ledger, commit="c" * 40, verdict="diverges")
    rewrite(
        ledger,
        commit="c" * 40,
        verdict="conforms",
        id="20990101T000001-00000002",
        created="2099-01-01T00:00:01+00:00",
    )
    ran = gate(place, ledger, "--commit", "c" * 40)
    assert ran.code == 1 and ran.findings()["verdict"]["state"] == "fail"


def test_an_old_run_does_not_speak(gate, policy, ledger):
    # The history's runs are as old as they are; a millionth of a day is less.
    ran = gate(
        policy(HEALTHY, more='[runs]\nfactors = "any"\ncommit = "any"\nmax_age_days = 1e-6'), ledger
    )
    assert ran.code == 3 and "older than 1e-06 days" in ran.findings()["run"]["text"]


def test_without_an_anchor_nothing_is_proven(gate, policy, ledger, runs):
    digest = next(run.checkpoint for run in runs if run.seeds.get("weights") == 4)
    rewrite(ledger, checkpoint="e" * 64)
    ran = gate(policy(HEALTHY, digest="e" * 64), ledger)
    assert ran.code == 3 and "no anchor is pinned" in ran.findings()["anchor"]["text"]
    pin(str(ledger), ["20990101"], reason="accepted", release="")
    assert gate(policy(HEALTHY, digest="e" * 64), ledger).code == 0
    assert gate(policy(HEALTHY, digest=digest), ledger).code == 0
    ran = gate(policy(HEALTHY, digest="e" * 64, more='[drift]\nanchor = "optional"'), ledger)
    assert ran.code == 0


@pytest.mark.parametrize(
    ("budget", "code", "state"),
    [("top1_beyond_ties = 0", 0, "pass"), ("perplexity_increase_percent = -50.0", 1, "fail")],
)
def test_a_budget_is_kept(gate, policy, ledger, budget, code, state):
    ran = gate(policy(HEALTHY, more=f"[budget]\n{budget}"), ledger)
    assert ran.code == code
    (name,) = {"top1", "perplexity"} & set(ran.findings())
    assert ran.findings()[name]["state"] == state


def test_the_break_costs_tokens(gate, policy, ledger):
    ran = gate(policy(BROKEN, more="[budget]\ntop1_beyond_ties = 0"), ledger)
    assert ran.findings()["top1"]["state"] == "fail"


def test_anchors_are_set_and_shown(command, ledger, runs):
    later = [run for run in runs if (run.subject, run.target, run.dtype) == HEALTHY][5]
    code, out, _ = command("anchor", "set", later.id, "--ledger", ledger, "--reason", "better")
    assert code == 0 and later.id in out
    code, out, _ = command("anchor", "show", "--ledger", ledger)
    assert code == 0 and f"{later.id}  {later.cell}" in out and "better" in out


MISTAKES = {
    "schema = 2": "has another layout",
    "[gate]\nx = 1": "is no policy",
    '[[require]]\nsubject = "x"\ntargets = ["llvm"]\ndtypes = ["int8"]\ncheckpoints = []': "int8",
    '[[require]]\nsubject = "x"\ntargets = ["a"]\ndtypes = []\ncheckpoints = ["b"]': "not defined",
    "nonsense": "is no policy",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_policy_with_a_mistake_is_refused(command, policy, ledger, text):
    place = policy(HEALTHY)
    old = place.read_text()
    place.write_text(text if text.startswith("schema") else old + text)
    if text.startswith("schema"):
        place.write_text(old.replace("schema = 1", text))
    code, out, err = command("gate", "--release", "1", "--policy", place, "--ledger", ledger)
    assert (code, out) == (2, "") and MISTAKES[text] in err and err.count("\n") == 1, err


def test_a_policy_that_requires_nothing_is_refused(command, policy, ledger):
    place = policy()
    place.write_text(place.read_text() + "require = []\n")
    code, _, err = command("gate", "--release", "1", "--policy", place, "--ledger", ledger)
    assert (code == 2 and "is no policy" in err) or "requires nothing" in err


@pytest.mark.parametrize("field", ["reason", "owner"])
def test_a_waiver_without_a_reason_or_an_owner_is_refused(command, policy, ledger, tmp_path, field):
    place = policy(HEALTHY)
    waive(tmp_path, HEALTHY, "verdict", TODAY)
    file = tmp_path / "waivers" / "verdict.toml"
    lines = [
        f'{field} = " "' if one.startswith(field) else one for one in file.read_text().split("\n")
    ]
    file.write_text("\n".join(lines))
    code, _, err = command("gate", "--release", "1", "--policy", place, "--ledger", ledger)
    assert code == 2 and f"verdict.toml: {field}: is empty" in err
