"""Reading and writing a ledger, whatever database holds it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import BadInput
from harness.ledger import schema
from harness.ledger.checked import JSON_FIELDS, checked_run, unpack
from harness.ledger.records import Anchor, Cell, Entry, Run, Value

_RUN_FIELDS = tuple(field.name for field in fields(Run))
# One lock for all who make or migrate tables on a shared server; any number serves.
_SERVER_LOCK = schema.APPLICATION_ID


class Ledger:
    """One ledger, opened by `Ledger.open`."""

    def __init__(self, engine: Any, where: str) -> None:
        self._engine = engine
        self.where = where

    @classmethod
    def open(cls, place: str | Path, *, write: bool = False) -> Ledger:
        """Open a ledger; to be written, it is made if it is not there.

        Parameters
        ----------
        place
            A file, or a URL as SQLAlchemy takes it: ``sqlite:///FILE``,
            ``postgresql://user@host/database``.
        write
            Whether runs will be written.

        Raises
        ------
        BadInput
            If it is no ledger, is damaged, comes from a later version or cannot be reached.
        """
        text = str(place).removeprefix("sqlite:///")
        if "://" not in text:
            return cls._open_file(Path(text), write)
        return cls._open_server(text)

    @classmethod
    def _open_file(cls, path: Path, write: bool) -> Ledger:
        from sqlalchemy import create_engine

        from harness.ledger import sqlite_file

        try:
            missing = not path.exists()
        except (OSError, ValueError) as error:
            raise BadInput(
                f"is no file's name: {error}", where=f"--ledger {str(path)!r}"
            ) from error
        if write and missing:
            sqlite_file.create(path)
        sqlite_file.require_ledger(path, whole=False)
        engine = create_engine(sqlite_file.url(path))
        sqlite_file.configure(engine, write=write)
        found = cls(engine, str(path))
        found._require_version()
        return found

    @classmethod
    def _open_server(cls, url: str) -> Ledger:
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError

        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite":
                raise BadInput(
                    "names no file", where=f"--ledger {url}", expected="FILE, or sqlite:///FILE"
                )
            if parsed.drivername in ("postgresql", "postgres"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            shown = parsed.render_as_string(hide_password=True)
            engine = create_engine(parsed)
        except (ArgumentError, NoSuchModuleError) as error:
            raise BadInput(f"is no database: {_first_line(error)}", where="--ledger") from error
        except ModuleNotFoundError as error:
            raise BadInput(
                f"needs a driver: {error}",
                where="--ledger",
                hint="pip install 'mpt-conformance[postgres]'",
            ) from error
        found = cls(engine, shown)
        with found._transaction() as connection:
            if parsed.get_backend_name() == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SERVER_LOCK})")
            schema.metadata.create_all(connection)
            if connection.execute(schema.ledger.select()).first() is None:
                connection.execute(schema.ledger.insert().values(version=schema.VERSION))
        found._require_version()
        return found

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_version(self) -> None:
        with self._transaction() as connection:
            row = connection.execute(schema.ledger.select()).first()
            version = row[0] if row is not None else None
        if version == schema.VERSION:
            return
        if version not in schema.MIGRATIONS:
            raise BadInput(
                "comes from another version of mpt-conform",
                where=self.where,
                expected=f"layout {schema.VERSION} or older",
                found=version,
                hint="update mpt-conformance",
            )
        with self._transaction() as connection:
            # Read again: somebody may have been faster.
            now = connection.execute(schema.ledger.select()).first()
            if now is not None and now[0] == version:
                schema.migrate(connection, version)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        from sqlalchemy.exc import DBAPIError

        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise BadInput(
                f"cannot be used: {_first_line(error.orig)}", where=self.where
            ) from error

    # -- writing -------------------------------------------------------------------------------

    def write(self, *entries: Entry) -> None:
        """Write runs: all of them, with all of their values, or nothing.

        A run that is there already is left as it is, so that an import can be repeated.

        Raises
        ------
        BadInput
            If the database cannot be written.
        """
        with self._transaction() as connection:
            for entry in entries:
                known = schema.run.select().where(schema.run.c.id == entry.run.id)
                if connection.execute(known.with_only_columns(schema.run.c.id)).first():
                    continue
                connection.execute(schema.run.insert().values(**_row(entry)))
                values = [{"run": entry.run.id, **asdict(value)} for value in entry.values]
                if values:
                    connection.execute(schema.value.insert(), values)

    def pin(self, anchor: Anchor) -> None:
        """Pin an anchor; the newest of a cell counts, older ones stay on record."""
        with self._transaction() as connection:
            connection.execute(
                schema.anchor.insert().values(
                    run=anchor.run,
                    pinned=anchor.pinned,
                    release=anchor.release,
                    reason=anchor.reason,
                )
            )

    # -- reading -------------------------------------------------------------------------------

    def runs(self, cell: Cell | None = None) -> tuple[Run, ...]:
        """Return every run, or those of one cell, oldest first."""
        table = schema.run
        query = table.select().with_only_columns(*(table.c[name] for name in _RUN_FIELDS))
        if cell is not None:
            for name in ("subject", "target", "dtype", "checkpoint"):
                query = query.where(table.c[name] == getattr(cell, name))
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(table.c.created, table.c.id)).all()
        return tuple(
            checked_run(dict(zip(_RUN_FIELDS, row, strict=True)), self.where) for row in rows
        )

    def values(self, runs: Iterable[str] | None = None) -> dict[str, tuple[Value, ...]]:
        """Return the values by run; of all runs if none are named."""
        table = schema.value
        query = table.select().with_only_columns(
            table.c.run,
            table.c.mode,
            table.c.tap,
            table.c.metric,
            table.c.value,
            table.c.layer,
            table.c.statistic,
        )
        found: dict[str, list[Value]] = {}
        with self._transaction() as connection:
            for part in [None] if runs is None else _portions(list(runs)):
                chosen = query if part is None else query.where(table.c.run.in_(part))
                for row in connection.execute(chosen):
                    found.setdefault(row[0], []).append(_value(*row[1:]))
        return {name: tuple(values) for name, values in found.items()}

    def details(self, run: str) -> Mapping[str, Any]:
        """Return the details of one run; empty if there is no such run."""
        query = schema.run.select().with_only_columns(schema.run.c.details)
        with self._transaction() as connection:
            row = connection.execute(query.where(schema.run.c.id == run)).first()
        found: Mapping[str, Any] = {} if row is None else unpack(row[0], f"{self.where}: run {run}")
        return found

    def every_details(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the details of every run, oldest first, one in memory at a time."""
        table = schema.run
        query = table.select().with_only_columns(table.c.id, table.c.details)
        with self._transaction() as connection:
            for row in connection.execute(query.order_by(table.c.created, table.c.id)):
                yield row[0], unpack(row[1], f"{self.where}: run {row[0]}")

    def entries(self) -> Iterator[Entry]:
        """Yield every run with its values and details, oldest first."""
        values = self.values()
        runs = {run.id: run for run in self.runs()}
        for name, details in self.every_details():
            if name in runs:
                yield Entry(runs[name], values.get(name, ()), details)

    def anchors(self) -> tuple[Anchor, ...]:
        """Return every anchor that was ever pinned, oldest first."""
        table = schema.anchor
        with self._transaction() as connection:
            rows = connection.execute(table.select().order_by(table.c.pinned)).all()
        if not rows:
            return ()
        cells = {run.id: run.cell for run in self.runs()}
        return tuple(Anchor(cells[r.run], r.run, r.pinned, r.release, r.reason) for r in rows)

    def current_anchors(self) -> dict[Cell, Anchor]:
        """Return the anchor in force of every cell that has one."""
        return {anchor.cell: anchor for anchor in self.anchors()}

    def find(self, run: str) -> Run:
        """Return the run whose id starts with ``run``.

        Raises
        ------
        BadInput
            If there is none, or more than one.
        """
        found = [one for one in self.runs() if one.id.startswith(run)]
        if len(found) != 1:
            raise BadInput(
                "names no run" if not found else "names several runs",
                where=f"{self.where}: {run!r}",
                found=", ".join(one.id for one in found[:4]) or None,
                hint="mpt-conform ledger list",
            )
        return found[0]


def _value(
    mode: str, tap: str, metric: str, value: Any, layer: int | None, statistic: str
) -> Value:
    # Some databases keep a NaN, which is neither above a limit nor below it.
    number = value if isinstance(value, int | float) and math.isfinite(value) else None
    return Value(mode, tap, metric, number, layer, statistic)


def _portions(names: Sequence[str], size: int = 500) -> Iterator[Sequence[str]]:
    for at in range(0, len(names), size):
        yield names[at : at + size]


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def pack(details: Mapping[str, Any]) -> bytes:
    """Return details as the ledger holds them."""
    return zlib.compress(msgspec.json.encode(details), 9)


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry.run, name) for name in _RUN_FIELDS}
    for name in JSON_FIELDS:
        row[name] = json.dumps(dict(row[name]), sort_keys=True)
    return {**row, "details": pack(entry.details)}
