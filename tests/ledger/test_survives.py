"""Whatever happens to writers, what was committed is there, and nothing half-written is."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import BadInput
from harness.ledger import sqlite_file
from harness.ledger.store import Ledger

WRITER = Path(__file__).with_name("writer.py")
KILLS = 100


def start(*words: object, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload, no-any-return]


def complete(place: Path, make) -> set[str]:
    """Names of the runs of a ledger, each of which has all of its values and details."""
    sqlite_file.require_ledger(place, whole=True)
    with Ledger.open(place) as ledger:
        names = {run.id for run in ledger.runs()}
        values = ledger.values()
        assert set(values) == names
        for name in names:
            expected = make(int(name.partition("-")[2], 16))
            # The file keeps them by key, not in the order of writing.
            assert set(values[name]) == set(expected.values)
        for name, details in ledger.every_details():
            assert details["report"]["number"] == int(name.partition("-")[2], 16)
    return names


def test_writers_killed_at_random_moments_lose_nothing_that_was_committed(tmp_path, make):
    place = tmp_path / "ledger.db"
    process = start("killed", place, KILLS, 7)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    said = out.splitlines()
    # The last word of a writer may be cut off by the signal; a name is 24 characters.
    committed = {name for name in said if len(name) == 24}
    kills_that_wrote = {int(name.partition("-")[2], 16) // 1_000_000 for name in committed}
    assert len(kills_that_wrote) > KILLS // 4, "the writers were killed before they wrote"
    found = complete(place, make)
    assert committed <= found
    # A run may have been committed in the moment before its name was said: at most one a kill.
    assert len(found - committed) <= KILLS


def test_eight_writers_at_once_lose_no_row(tmp_path, make):
    place = tmp_path / "ledger.db"
    writers = [start("write", place, at * 1000, 25) for at in range(8)]
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    found = complete(place, make)
    assert found == {make(at * 1000 + n).run.id for at in range(8) for n in range(25)}


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, make):
    place = tmp_path / "ledger.db"
    with Ledger.open(place, write=True) as ledger:
        ledger.write(make(0))
    limit = place.stat().st_size + 200_000

    def full() -> None:
        # No file of this process may grow further: what a full disk is to it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("write", place, 1, 100_000, preexec_fn=full, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cannot be used: " in err and "BadInput" in err
    committed = set(out.splitlines()) | {make(0).run.id}
    assert len(committed) > 5
    assert complete(place, make) == committed


def test_two_who_make_the_same_ledger_agree_on_one(tmp_path, make):
    place = tmp_path / "ledger.db"
    sqlite_file.create(place)
    with Ledger.open(place, write=True) as ledger:
        ledger.write(make(1))
    sqlite_file.create(place)
    assert complete(place, make) == {make(1).run.id}
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]


def test_a_run_that_fails_midway_is_not_there(tmp_path, make):
    place = tmp_path / "ledger.db"
    good, bad = make(1), make(2)
    # The same key twice: the database refuses the second row after the run and the first one.
    twice = type(bad)(bad.run, (bad.values[0], bad.values[0]), bad.details)
    with Ledger.open(place, write=True) as ledger:
        ledger.write(good)
        with pytest.raises(BadInput, match="cannot be used"):
            ledger.write(twice)
    assert complete(place, make) == {good.run.id}
