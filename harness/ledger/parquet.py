"""A ledger as Parquet: a folder of tables that any data tool reads, there and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.ledger import schema
from harness.ledger.checked import JSON_FIELDS, checked_run, unpack
from harness.ledger.records import Anchor, Entry, Run, Value
from harness.ledger.store import Ledger, pack

_TABLES = ("runs", "values", "anchors")
_LAYOUT = b"mpt-conform layout"


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise BadInput(
            "Parquet needs pyarrow", hint="pip install 'mpt-conformance[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def export(ledger: Ledger, folder: Path) -> int:
    """Write a ledger as ``runs.parquet``, ``values.parquet`` and ``anchors.parquet``.

    Returns
    -------
    int
        The number of runs.

    Raises
    ------
    BadInput
        If the folder is there already or cannot be written, or pyarrow is missing.
    """
    arrow, parquet = _arrow()
    try:
        taken = folder.exists()
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=str(folder)) from error
    if taken:
        raise BadInput("is there already", where=str(folder), hint="name a folder that is not")
    entries = list(ledger.entries())
    runs = [{**_plain_run(one.run), "details": pack(one.details)} for one in entries]
    values = [{"run": one.run.id, **asdict(value)} for one in entries for value in one.values]
    anchors = [
        {"run": a.run, "pinned": a.pinned, "release": a.release, "reason": a.reason}
        for a in ledger.anchors()
    ]
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, rows in zip(_TABLES, (runs, values, anchors), strict=True):
                made = arrow.Table.from_pylist(rows, schema=_schema(arrow, name))
                file = unfinished / f"{name}.parquet"
                parquet.write_table(made, file, compression="zstd", use_dictionary=True)
            unfinished.chmod(0o755)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return len(runs)


def read(folder: Path) -> tuple[list[Entry], list[Anchor]]:
    """Return what a folder of Parquet holds.

    Raises
    ------
    BadInput
        If a table is missing, damaged, or not as an export writes it.
    """
    arrow, parquet = _arrow()
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in _TABLES:
        file = folder / f"{name}.parquet"
        try:
            found = parquet.read_table(file)
        except (OSError, arrow.ArrowException) as error:
            text = str(error).partition("\n")[0]
            raise BadInput(f"cannot be read: {text}", where=str(file)) from error
        wanted = _schema(arrow, name)
        layout = (found.schema.metadata or {}).get(_LAYOUT)
        if layout != wanted.metadata[_LAYOUT] or not found.schema.equals(wanted):
            raise BadInput(
                "is no table of a ledger", where=str(file), expected=f"layout {schema.VERSION}"
            )
        tables[name] = found.to_pylist()
    values: dict[str, list[Value]] = {}
    for row in tables["values"]:
        values.setdefault(row.pop("run"), []).append(Value(**row))
    for name, every in values.items():
        if len({(value.mode, value.tap, value.metric) for value in every}) < len(every):
            raise BadInput("is damaged: a value is there twice", where=f"{folder}: run {name}")
    entries = []
    for row in tables["runs"]:
        details = unpack(row.pop("details"), f"{folder}: run {row['id']}")
        run = checked_run(row, str(folder))
        entries.append(Entry(run, tuple(values.get(run.id, ())), details))
    cells = {one.run.id: one.run.cell for one in entries}
    for row in (*tables["anchors"], *({"run": name} for name in values)):
        if row["run"] not in cells:
            raise BadInput("is damaged: a row belongs to no run", where=f"{folder}: {row['run']}")
    anchors = [Anchor(cell=cells[row["run"]], **row) for row in tables["anchors"]]
    return entries, anchors


def _plain_run(run: Run) -> Mapping[str, Any]:
    row = asdict(run)
    for name in JSON_FIELDS:
        row[name] = json.dumps(row[name], sort_keys=True)
    return row


def _schema(arrow: Any, name: str) -> Any:
    text, number = arrow.string(), arrow.float64()
    columns = {
        "runs": {
            **{f.name: number if f.name == "seconds" else text for f in fields(Run)},
            "details": arrow.binary(),
        },
        "values": {
            "run": text,
            "mode": text,
            "tap": text,
            "metric": text,
            "value": number,
            "layer": arrow.int32(),
            "statistic": text,
        },
        "anchors": {"run": text, "pinned": text, "release": text, "reason": text},
    }[name]
    return arrow.schema(columns, metadata={_LAYOUT: str(schema.VERSION).encode()})
