"""A ledger in one SQLite file: whose it is, whether it is whole, and how it comes to be."""

from __future__ import annotations

import os
import sqlite3
import struct
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.ledger import schema

_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID_AT = 68
# Long enough for every other writer of a busy night to finish; a check takes longer than that.
_PATIENCE_MS = 120_000


def require_ledger(path: Path, *, whole: bool) -> None:
    """Refuse a file that is no ledger or is damaged; reads, and touches nothing.

    Parameters
    ----------
    path
        The file.
    whole
        Read every page, too, and follow every index.

    Raises
    ------
    BadInput
        If it is not there, not a ledger, or damaged.
    """
    try:
        with path.open("rb") as file:
            header = file.read(100)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot be read: {text}", where=str(path)) from error
    if not header.startswith(_MAGIC) or len(header) < 100:
        raise BadInput("is no ledger", where=str(path), expected="a SQLite file of mpt-conform")
    (owner,) = struct.unpack_from(">I", header, _APPLICATION_ID_AT)
    if owner != schema.APPLICATION_ID:
        raise BadInput(
            "is a SQLite file of another program, no ledger",
            where=str(path),
            expected=f"application id {schema.APPLICATION_ID:#x}",
            found=f"{owner:#x}",
        )
    page = struct.unpack_from(">H", header, 16)[0]
    if size % (65536 if page == 1 else max(page, 512)):
        raise BadInput("is damaged: its last page is cut off", where=str(path))
    if whole:
        _read_through(path)


def _read_through(path: Path) -> None:
    # A file that nobody has open is read as it lies, so that not even a lock file appears.
    quiet = "" if _has_log(path) else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{quiet}", uri=True)) as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check(1)")]
            broken = db.execute("PRAGMA foreign_key_check").fetchone()
    except sqlite3.DatabaseError as error:
        raise BadInput(f"is damaged: {error}", where=str(path)) from error
    if found != ["ok"] or broken is not None:
        text = found[0] if found != ["ok"] else "a row belongs to no run"
        raise BadInput(f"is damaged: {' '.join(text.split())}", where=str(path))


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def url(path: Path) -> Any:
    """Return SQLAlchemy's name of a file, whatever signs are in it: a URL would end at ``?``."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path))


def create(path: Path) -> None:
    """Make an empty ledger, complete or not at all; another process may be faster.

    Raises
    ------
    BadInput
        If the place cannot be written.
    """
    from sqlalchemy import create_engine

    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot be made: {text}", where=str(path)) from error
    os.close(handle)
    try:
        engine = create_engine(url(Path(name)))
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            schema.metadata.create_all(connection)
            connection.execute(schema.ledger.insert().values(version=schema.VERSION))
        engine.dispose()
        with closing(sqlite3.connect(name)) as db:
            db.execute("PRAGMA journal_mode = WAL")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        # Unlike a rename this never takes the place of what somebody else made meanwhile.
        with suppress(FileExistsError):
            os.link(name, path)
    except OSError as error:
        raise BadInput(f"cannot be made: {error.strerror}", where=str(path)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def configure(engine: Any, *, write: bool) -> None:
    """Let every connection wait for its turn, and a commit return only when it is on disk."""
    from sqlalchemy import event

    def connected(connection: Any, record: Any) -> None:
        # Transactions are begun below, by name; the driver's own would start too late.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    def begin(connection: Any) -> None:
        # A writer takes its turn before it reads: two that have read would both have to give up.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
