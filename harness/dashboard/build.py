"""``mpt-conform report``: from a ledger to a folder of pages, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from harness.certify.certificate import Certificate, read_certificate
from harness.dashboard import pages
from harness.dashboard.charts import charts
from harness.dashboard.view import CellView, cell_series, cell_views, short
from harness.errors import BadInput
from harness.gate.findings import GateResult
from harness.ledger.records import Run
from harness.ledger.store import Ledger

_MARK = ".mpt-conform-site"
"""Says that a folder is a dashboard, which may be replaced; no other folder is."""


@dataclass(frozen=True)
class Made:
    """A site that was built."""

    index: Path
    runs: int
    pages: int
    seconds: float


def build(ledger: str, out: Path, policy: Path | None = None) -> Made:
    """Build the pages of a ledger.

    Parameters
    ----------
    ledger
        File or URL.
    out
        Folder to make; a dashboard that is there is replaced.
    policy
        A ``gate.toml`` to show the state of.

    Raises
    ------
    BadInput
        If the ledger cannot be read, or the folder holds something else.
    """
    started = time.perf_counter()
    try:
        taken = out.exists() and any(out.iterdir()) and not (out / _MARK).exists()
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot be made: {text}", where=str(out)) from error
    if taken:
        raise BadInput(
            "holds something else than a dashboard", where=str(out), hint="name another folder"
        )
    certificates = shipped_certificates()
    with Ledger.open(ledger) as opened:
        gate = _gate(opened, ledger, policy)
        try:
            unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.resolve().parent))
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", where=str(out)) from error
        try:
            count = _write(opened, unfinished, gate, certificates)
            unfinished.chmod(0o755)
            (unfinished / _MARK).touch()
            _put(unfinished, out)
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", where=str(out)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    html = sum(1 for _ in out.rglob("*.html"))
    return Made(out / "index.html", count, html, time.perf_counter() - started)


def _put(unfinished: Path, out: Path) -> None:
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.resolve().parent))
        os.rename(out, old / "old")
        os.rename(unfinished, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(unfinished, out)


def _gate(ledger: Ledger, place: str, policy: Path | None) -> GateResult | None:
    if policy is None:
        return None
    from harness.gate.command import gate

    runs = ledger.runs()
    # The page shows where the newest commit stands, whoever looks at it.
    commit = runs[-1].commit if runs else ""
    return gate(
        policy,
        place,
        release="newest commit",
        commit=commit or "unknown",
        fresh=False,
        progress=lambda text: None,
    )


def shipped_certificates() -> list[Certificate]:
    """Return the certificates that came with the package, by target."""
    folder = resources.files("harness.certify")
    names = sorted(
        file.name
        for file in folder.iterdir()
        if file.name.startswith("certificate-") and file.name.endswith(".json")
    )
    return [read_certificate(folder.joinpath(name).read_bytes()) for name in names]


def _write(
    ledger: Ledger, site: Path, gate: GateResult | None, certificates: list[Certificate]
) -> int:
    from jinja2 import TemplateError

    runs = ledger.runs()
    values = ledger.values()
    views = cell_views(runs, values, ledger.current_anchors())
    for name in ("runs", "data", "static"):
        (site / name).mkdir()
    static = resources.files("harness.dashboard").joinpath("static")
    for file in static.iterdir():
        (site / "static" / file.name).write_bytes(file.read_bytes())
    _data(site, "charts", charts())
    by_id = {run.id: run for run in runs}
    cell_of = {run.id: view for view in views for run in view.runs}
    for view in views:
        _cell_data(site, view, values)
    _data(site, "index", _index(views))
    for name, details in ledger.every_details():
        # A run that was written meanwhile waits for the next build.
        if name not in by_id:
            continue
        try:
            _run_page(site, by_id[name], details, cell_of[name], by_id)
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            # What has arrived from elsewhere was packed by no check of this version.
            raise BadInput(
                "is damaged: its details are not what a check records",
                where=f"{ledger.where}: run {name}",
                found=f"{type(error).__name__}: {error}",
                hint="import it again, or leave the run out of the ledger",
            ) from error
    every = {
        "index": pages.overview(views, gate, len(runs)),
        "trend": pages.trend(views),
        "compare": pages.compare(views),
        "certificate": pages.certificate(certificates),
    }
    for name, page in every.items():
        (site / f"{name}.html").write_text(page, encoding="utf-8")
    _data(site, "certificates", [pages.certificate_rows(one) for one in certificates])
    return len(runs)


def _data(site: Path, name: str, content: Any) -> None:
    """Write data as a script, which a page may load from disk where it may not fetch."""
    text = msgspec.json.encode(content).decode().replace("</", "<\\/")
    (site / "data" / f"{name}.js").write_text(
        f"conform.receive({msgspec.json.encode(name).decode()}, {text});\n", encoding="utf-8"
    )


def _index(views: list[CellView]) -> list[dict[str, Any]]:
    return [
        {
            "number": view.number,
            "subject": view.cell.subject,
            "target": view.cell.target,
            "dtype": view.cell.dtype,
            "checkpoint": view.label,
            "runs": [run.id for run in view.runs],
            "verdicts": [run.verdict for run in view.runs],
            "commits": [run.commit[:12] for run in view.runs],
        }
        for view in views
    ]


def _cell_data(site: Path, view: CellView, values: Mapping[str, Any]) -> None:
    every = cell_series(view, values)
    marks: dict[int, list[str]] = {}
    for at, name in view.marks:
        marks.setdefault(at, []).append(name)
    anchor = [at for at, r in enumerate(view.runs) if view.anchor and r.id == view.anchor.run]
    about = {
        "anchor": anchor[0] if anchor else None,
        "alarms": [[at, names] for at, names in sorted(marks.items())],
        "series": [[one.mode, one.metric, list(one.taps)] for one in every],
    }
    _data(site, f"cell-{view.number}", about)
    for one in every:
        content = {
            "values": {tap: [short(v) for v in column] for tap, column in one.taps.items()},
            "baselines": {tap: [short(v) for v in c] for tap, c in one.baselines.items()},
        }
        _data(site, f"trend-{view.number}-{one.mode}-{one.metric}", content)


def _run_page(
    site: Path, run: Run, details: Mapping[str, Any], view: CellView, by_id: Mapping[str, Run]
) -> None:
    anchor = by_id.get(view.anchor.run) if view.anchor is not None else None
    page = pages.run(run, details, view, anchor)
    (site / "runs" / f"{run.id}.html").write_text(page, encoding="utf-8")
    _data(site, f"run-{run.id}", pages.run_rows(run, details))
