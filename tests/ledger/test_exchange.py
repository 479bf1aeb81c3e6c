"""There and back: SQLite, Parquet, and a PostgreSQL server that is really running."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import BadInput
from harness.ledger.exchange import pin, take_in
from harness.ledger.parquet import export
from harness.ledger.records import Cell, Value
from harness.ledger.store import Ledger

WRITER = Path(__file__).with_name("writer.py")


def content(place: object) -> tuple[object, ...]:
    with Ledger.open(str(place)) as ledger:
        values = {run: frozenset(every) for run, every in ledger.values().items()}
        return ledger.runs(), values, dict(ledger.every_details()), ledger.anchors()


@pytest.fixture
def ledger(tmp_path, make) -> Path:
    place = tmp_path / "ledger.db"
    entries = [make(number, dtype="bfloat16" if number % 2 else "float16") for number in range(6)]
    odd = Value("free-running", "logits", "of_limit", None, None, "tail")
    entries[3] = type(entries[3])(entries[3].run, (*entries[3].values, odd), entries[3].details)
    with Ledger.open(place, write=True) as opened:
        opened.write(*entries)
    pin(str(place), [entries[2].run.id], reason="the first that shipped", release="1.0")
    return place


def test_parquet_there_and_back(tmp_path, ledger):
    with Ledger.open(ledger) as opened:
        assert export(opened, tmp_path / "tables") == 6
    again = tmp_path / "again.db"
    assert take_in(tmp_path / "tables", str(again)) == (6, 0)
    assert content(again) == content(ledger)
    assert take_in(tmp_path / "tables", str(again)) == (0, 6)
    assert content(again) == content(ledger)


def test_parquet_is_one_row_a_run_tap_and_metric(tmp_path, ledger):
    import pyarrow.parquet

    with Ledger.open(ledger) as opened:
        export(opened, tmp_path / "tables")
    values = pyarrow.parquet.read_table(tmp_path / "tables" / "values.parquet")
    assert values.num_rows == 6 * 3 + 1
    keys = values.select(["run", "mode", "tap", "metric"]).to_pylist()
    assert len({tuple(key.values()) for key in keys}) == values.num_rows


@pytest.mark.parametrize("spoil", ["missing", "damaged", "foreign"])
def test_parquet_that_is_no_ledger(tmp_path, ledger, spoil):
    import pyarrow
    import pyarrow.parquet

    tables = tmp_path / "tables"
    with Ledger.open(ledger) as opened:
        export(opened, tables)
    file = tables / "values.parquet"
    if spoil == "missing":
        file.unlink()
    elif spoil == "damaged":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"run": ["x"]}), file)
    again = tmp_path / "again.db"
    with pytest.raises(BadInput, match=r"values\.parquet: "):
        take_in(tables, str(again))
    assert not again.exists()


def test_an_export_replaces_nothing(tmp_path, ledger):
    (tmp_path / "tables").mkdir()
    with Ledger.open(ledger) as opened, pytest.raises(BadInput, match="is there already"):
        export(opened, tmp_path / "tables")


def test_the_newest_anchor_of_a_cell_is_in_force(ledger, make):
    first, later = make(2).run, make(4).run
    pin(str(ledger), [later.id], reason="better", release="1.1")
    with Ledger.open(ledger) as opened:
        assert [anchor.run for anchor in opened.anchors()] == [first.id, later.id]
        cell = Cell("relax", "llvm", "float16", "ab" * 32)
        assert opened.current_anchors()[cell].run == later.id


def test_an_anchor_needs_a_run_that_conforms_and_a_reason(ledger, make):
    with Ledger.open(ledger, write=True) as opened:
        opened.write(make(9, verdict="diverges"))
    with pytest.raises(BadInput, match="expected a run that conforms, found diverges"):
        pin(str(ledger), [make(9).run.id], reason="it is green to me", release="")
    with pytest.raises(BadInput, match="why these runs are accepted"):
        pin(str(ledger), [make(2).run.id], reason=" ", release="")
    with pytest.raises(BadInput, match="names several runs"):
        pin(str(ledger), ["2026"], reason="all", release="")


# -- PostgreSQL --------------------------------------------------------------------------------


def programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "no PostgreSQL: install Debian's package postgresql"
    return found[-1].parent


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of its own; as it refuses to run as root, in a folder that others can reach."""
    with tempfile.TemporaryDirectory(prefix="conform-server-") as folder:
        yield from serve(Path(folder))


def serve(folder: Path) -> Iterator[str]:
    as_user: list[str] = []
    if os.getuid() == 0:
        assert shutil.which("setpriv"), "no setpriv: install Debian's package util-linux"
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = programs()
    data = folder / "data"

    def run(*words: object) -> None:
        done = subprocess.run(
            [*as_user, *map(str, words)], capture_output=True, text=True, cwd="/", timeout=100
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(home / "initdb", "-D", data, "-U", "conform", "-A", "trust", "--no-sync", "-E", "UTF8")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    run(home / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start")
    try:
        yield f"postgresql://conform@127.0.0.1:{port}/postgres"
    finally:
        run(home / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


def test_postgresql_there_and_back(tmp_path, ledger, server):
    assert take_in(ledger, server) == (6, 0)
    assert content(server) == content(ledger)
    assert take_in(ledger, server) == (0, 6)
    with Ledger.open(server) as opened:
        export(opened, tmp_path / "tables")
    take_in(tmp_path / "tables", str(tmp_path / "again.db"))
    assert content(tmp_path / "again.db") == content(ledger)


def test_eight_writers_share_a_server(server, make):
    writers = [
        subprocess.Popen(
            [sys.executable, str(WRITER), "write", server, str(10_000 + at * 1000), "10"],
            stdout=subprocess.DEVNULL,
        )
        for at in range(8)
    ]
    assert [writer.wait(timeout=100) for writer in writers] == [0] * 8
    with Ledger.open(server) as opened:
        names = {run.id for run in opened.runs()}
        values = opened.values()
    expected = {make(10_000 + at * 1000 + n).run.id for at in range(8) for n in range(10)}
    assert expected <= names
    for name in expected:
        assert set(values[name]) == set(make(int(name.partition("-")[2], 16)).values)
