"""Names and contents that no check has written: one sentence and exit code 2."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing

import pytest

from harness.cli import main
from harness.ledger.store import Ledger


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpt-conform", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("verdict", "'great'", "its verdict is none"),
        ("created", "'yesterday'", "its time is none"),
        ("created", "'2026-01-01T00:00:00'", "expected ISO 8601 with a zone"),
        ("seeds", "'{'", "seeds cannot be read"),
        ("environment", "'[1]'", "environment cannot be read"),
        ("details", "x'00'", "its details cannot be read"),
        ("id", "'../x'", "its id is none"),
    ],
)
def test_a_run_that_no_check_has_written(tmp_path, make, command, column, value, said):
    place, mine = tmp_path / "ledger.db", tmp_path / "mine.db"
    entry = make(1)
    with Ledger.open(place, write=True) as opened:
        opened.write(type(entry)(entry.run, (), entry.details))
    with closing(sqlite3.connect(place)) as db:
        db.execute(f"UPDATE conform_run SET {column} = {value}")
        db.commit()
    for words in (
        ("ledger", "import", place, "--ledger", mine),
        ("report", "--out", tmp_path / "site", "--ledger", place),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err
    assert not mine.exists() and not (tmp_path / "site").exists()


def test_any_sign_may_be_in_a_name(tmp_path, make):
    place = tmp_path / "a?b=c#d%20é.db"
    with Ledger.open(place, write=True) as opened:
        opened.write(make(1))
    with Ledger.open(place) as opened:
        assert len(opened.runs()) == 1
    assert {file.name for file in tmp_path.iterdir()} <= {
        place.name + s for s in ("", "-wal", "-shm")
    }


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "sqlite://", "sqlite+pysqlite:///l.db"])
@pytest.mark.parametrize("verb", ["list", "import"])
def test_a_name_of_no_file(tmp_path, make, command, monkeypatch, verb, name):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source.db"
    with Ledger.open(source, write=True) as opened:
        opened.write(make(1))
    words = ("list",) if verb == "list" else ("import", source)
    code, out, err = command("ledger", *words, "--ledger", name)
    assert (code, out) == (2, "") and err.count("\n") == 1, err


def test_a_nan_is_no_value(tmp_path, make, monkeypatch):
    from harness.ledger.store import _value

    assert _value("local", "logits", "of_limit", float("nan"), None, "rms").value is None


def test_report_onto_a_file(tmp_path, make, command):
    place, out = tmp_path / "ledger.db", tmp_path / "site"
    with Ledger.open(place, write=True):
        pass
    out.write_text("mine")
    code, _, err = command("report", "--out", out, "--ledger", place)
    assert code == 2 and err.count("\n") == 1 and out.read_text() == "mine"


def test_a_name_that_is_too_long(tmp_path, command):
    place = tmp_path / "ledger.db"
    with Ledger.open(place, write=True):
        pass
    for words in (("export", "x" * 300), ("import", "x" * 300)):
        code, _, err = command("ledger", *words, "--ledger", place)
        assert code == 2 and "File name too long" in err and err.count("\n") == 1, err


def test_an_import_with_a_value_twice_makes_no_ledger(tmp_path, make, command):
    import pyarrow
    import pyarrow.parquet

    place, tables, mine = tmp_path / "ledger.db", tmp_path / "tables", tmp_path / "mine.db"
    with Ledger.open(place, write=True) as opened:
        opened.write(make(1))
    assert command("ledger", "export", tables, "--ledger", place)[0] == 0
    file = tables / "values.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(pyarrow.concat_tables([table, table.slice(0, 1)]), file)
    code, _, err = command("ledger", "import", tables, "--ledger", mine)
    assert code == 2 and "a value is there twice" in err and not mine.exists()
