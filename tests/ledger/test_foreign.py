"""A file that is no ledger, or a damaged one: one sentence, exit code 2, and not a byte changed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from harness.cli import main
from harness.ledger import schema
from harness.ledger.store import Ledger

LAYOUT_1 = Path(__file__).with_name("layout-1.sql")


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpt-conform", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ledger(tmp_path, make) -> Path:
    place = tmp_path / "ledger.db"
    with Ledger.open(place, write=True) as opened:
        # Some pages, so that damage has a place to be.
        opened.write(*(make(number) for number in range(200)))
    return place


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.iterdir()
    }


def foreign(folder: Path) -> Path:
    place = folder / "bookmarks.db"
    with closing(sqlite3.connect(place)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE conform_run (id TEXT)")
        db.commit()
    return place


def spoiled(ledger: Path, folder: Path, how: str) -> Path:
    place = folder / "spoiled.db"
    content = bytearray(ledger.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2 + 100]
    elif how == "page":
        middle = len(content) // 2 // 4096 * 4096
        content[middle : middle + 4096] = os.urandom(4096)
    elif how == "half":
        content = content[: len(content) // 2 // 4096 * 4096]
    else:
        content[:16] = b"something else!!"
    place.write_bytes(content)
    return place


@pytest.mark.parametrize("how", ["cut", "page", "half", "magic"])
def test_import_of_a_damaged_ledger(tmp_path, ledger, command, how):
    folder = tmp_path / "given"
    folder.mkdir()
    place = spoiled(ledger, folder, how)
    before, mine = state(folder), tmp_path / "mine.db"
    code, out, err = command("ledger", "import", place, "--ledger", mine)
    assert (code, out) == (2, "")
    assert err.startswith(f"mpt-conform: {place}: ") and err.count("\n") == 1, err
    assert ("is no ledger" if how == "magic" else "is damaged") in err
    assert state(folder) == before
    assert not mine.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("ledger", "import", "{}", "--ledger", "mine.db"),
        ("ledger", "list", "--ledger", "{}"),
        ("check", "--ledger", "{}"),
        ("report", "--out", "site", "--ledger", "{}"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("kind", ["foreign", "text", "empty"])
def test_a_foreign_file_is_left_alone(tmp_path, monkeypatch, command, words, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "given"
    folder.mkdir()
    if kind == "foreign":
        place = foreign(folder)
    else:
        place = folder / "notes"
        place.write_text("To do: nothing.\n" * 20 if kind == "text" else "")
    before = state(folder)
    code, out, err = command(*(word.format(place) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith(f"mpt-conform: {place}: is ") and err.count("\n") == 1, err
    assert state(folder) == before


def test_a_later_layout_is_left_alone(tmp_path, ledger, command):
    with closing(sqlite3.connect(ledger)) as db:
        db.execute("UPDATE conform_ledger SET version = ?", (schema.VERSION + 1,))
        db.commit()
    before = ledger.read_bytes()
    code, _, err = command("check", "--ledger", ledger)
    assert code == 2
    assert f"expected layout {schema.VERSION} or older, found {schema.VERSION + 1}" in err
    assert ledger.read_bytes() == before


def test_an_earlier_layout_is_led_to_this_one(tmp_path, make):
    place = tmp_path / "old.db"
    with closing(sqlite3.connect(place)) as db:
        db.executescript(LAYOUT_1.read_text())
    with Ledger.open(place, write=True) as opened:
        (old,) = opened.runs()
        assert (old.factors, old.inputs) == ("", "")
        assert old.commit == f"{1:040x}"
        assert len(opened.values()[old.id]) == 3
        assert opened.details(old.id)["report"]["number"] == 1
        opened.write(make(2))
        assert [run.factors for run in opened.runs()] == ["", "f" * 64]
    with closing(sqlite3.connect(place)) as db:
        assert db.execute("SELECT version FROM conform_ledger").fetchall() == [(schema.VERSION,)]


def test_no_such_ledger(tmp_path, command):
    code, _, err = command("ledger", "list", "--ledger", tmp_path / "none.db")
    assert code == 2 and "cannot be read: No such file" in err
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("url", ["nonsense://here/db", "postgresql://nobody@127.0.0.1:1/none"])
def test_a_server_that_is_not_there(command, url):
    code, _, err = command("ledger", "list", "--ledger", url)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
