"""Building: whole or not at all, nobody else's folder, and quick and small for a large ledger."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.dashboard.build import _data, build
from harness.errors import BadInput
from harness.ledger.records import Entry
from harness.ledger.store import Ledger

RUNS = 1000
SECONDS = 20
MEGABYTES = 3


def test_a_thousand_runs_in_time_and_no_page_too_large(recorded, tmp_path):
    """The recorded runs over and over, each under a name and a time of its own."""
    with Ledger.open(recorded) as ledger:
        entries = list(ledger.entries())
    large = tmp_path / "large.db"
    made = []
    for at in range(RUNS):
        entry = entries[at % len(entries)]
        day = f"{2027 + at // 300}-{1 + at % 300 // 25:02d}-{1 + at % 25:02d}"
        created = f"{day}T00:00:00.{at:06d}+00:00"
        run = replace(entry.run, id=f"2027-{at:05d}", created=created)
        made.append(Entry(run, entry.values, entry.details))
    with Ledger.open(large, write=True) as ledger:
        ledger.write(*made)
    # The work of this process: what others do on the machine is no property of the dashboard.
    started = time.process_time()
    done = build(str(large), tmp_path / "site")
    spent = time.process_time() - started
    assert done.runs == RUNS
    assert len(list((tmp_path / "site" / "runs").glob("*.html"))) == RUNS
    assert spent < SECONDS
    sizes = {
        file: file.stat().st_size / 1e6 for file in (tmp_path / "site").rglob("*") if file.is_file()
    }
    # With everything that it loads at once, a page stays below the limit, too.
    shared = sum(size for file, size in sizes.items() if file.parent.name == "static")
    assert max(sizes.values()) + shared < MEGABYTES


def test_a_dashboard_is_replaced_and_nothing_else(recorded, tmp_path):
    site = tmp_path / "site"
    first = build(str(recorded), site)
    assert first.index == site / "index.html"
    stale = site / "runs" / "stale.html"
    stale.touch()
    build(str(recorded), site)
    assert not stale.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("four years")
    with pytest.raises(BadInput, match="holds something else than a dashboard"):
        build(str(recorded), other)
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_text_from_outside_is_text(recorded, tmp_path):
    with Ledger.open(recorded) as ledger:
        entry = next(iter(ledger.entries()))
    evil = '</script><script>alert("&amp;")</script>'
    run = replace(entry.run, name=evil, reproduce=evil, environment={"python": evil})
    place = tmp_path / "evil.db"
    with Ledger.open(place, write=True) as ledger:
        ledger.write(Entry(run, entry.values, entry.details))
    build(str(place), tmp_path / "site")
    for file in (tmp_path / "site").rglob("*.html"):
        assert "<script>alert" not in file.read_text()
    for file in (tmp_path / "site" / "data").iterdir():
        assert "</script" not in file.read_text()


@pytest.mark.parametrize(
    "details",
    [
        {"report": {"taps": [{}]}},
        {"report": {"taps": "none"}},
        {"report": []},
        {"slopes": [{}]},
        {"positions": 3},
        {"tokens": [{}]},
        {"tokens": 3},
    ],
)
def test_details_that_no_check_has_written_are_named(recorded, tmp_path, details):
    with Ledger.open(recorded) as ledger:
        entry = next(iter(ledger.entries()))
    place = tmp_path / "foreign.db"
    with Ledger.open(place, write=True) as ledger:
        ledger.write(Entry(entry.run, entry.values, details))
    with pytest.raises(BadInput, match=f"run {entry.run.id}.*is damaged: its details"):
        build(str(place), tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_command_says_what_it_made(recorded, tmp_path, monkeypatch, capsys):
    from harness.cli import main

    words = ["report", "--out", str(tmp_path / "site"), "--ledger", str(recorded)]
    monkeypatch.setattr(sys, "argv", ["mpt-conform", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'site' / 'index.html'}: 89 runs, ")
    page = (Path(tmp_path) / "site" / "certificate.html").read_text()
    assert "not proven" in page or "Certificate" in page


def test_a_name_with_a_quote_stays_a_name(tmp_path):
    (tmp_path / "data").mkdir()
    _data(tmp_path, 'a"b', [])
    assert (tmp_path / "data" / 'a"b.js').read_text() == 'conform.receive("a\\"b", []);\n'
