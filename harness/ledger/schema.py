"""Tables, their version, and the way from an older version to this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, Table, Text

VERSION = 2
APPLICATION_ID = 0x4D505443
"""``MPTC`` in a SQLite file's header: says whose file it is before anything is opened."""

metadata = MetaData()

ledger = Table("conform_ledger", metadata, Column("version", Integer, primary_key=True))

run = Table(
    "conform_run",
    metadata,
    Column("id", Text, primary_key=True),
    *(
        Column(name, Text, nullable=False)
        for name in (
            "created",
            "commit",
            "subject",
            "name",
            "target",
            "dtype",
            "device",
            "driver",
            "fault",
            "checkpoint",
            "checkpoint_path",
            "certificate",
            "seeds",
            "tvm",
            "torch",
            "transformers",
            "environment",
            "verdict",
            "reason",
            "reproduce",
        )
    ),
    Column("seconds", Float(53), nullable=False),
    # JSON, deflated: the record of the check and what the run page shows beyond it.
    Column("details", LargeBinary, nullable=False),
    Column("factors", Text, nullable=False, server_default=""),
    Column("inputs", Text, nullable=False, server_default=""),
    Index("conform_run_cell", "subject", "target", "dtype", "checkpoint", "created"),
)

value = Table(
    "conform_value",
    metadata,
    Column("run", Text, ForeignKey("conform_run.id"), primary_key=True),
    Column("mode", Text, primary_key=True),
    Column("tap", Text, primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("layer", Integer),
    Column("statistic", Text, nullable=False),
    Column("value", Float(53)),
    # A row is found by its key alone: without a hidden one the file is half as large.
    sqlite_with_rowid=False,
)

anchor = Table(
    "conform_anchor",
    metadata,
    Column("run", Text, ForeignKey("conform_run.id"), primary_key=True),
    Column("pinned", Text, primary_key=True),
    Column("release", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

MIGRATIONS: Mapping[int, tuple[str, ...]] = {
    # Version 1 did not say by which limits a run was judged, nor on which tokens.
    1: (
        "ALTER TABLE conform_run ADD COLUMN factors TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE conform_run ADD COLUMN inputs TEXT NOT NULL DEFAULT ''",
    ),
}
"""By the version they start from: statements that lead to the next one, in any SQL dialect."""


def migrate(connection: Any, found: int) -> None:
    """Lead the tables from version ``found`` to this one, within the caller's transaction."""
    for version in range(found, VERSION):
        for statement in MIGRATIONS[version]:
            connection.exec_driver_sql(statement)
    connection.execute(ledger.update().values(version=VERSION))
