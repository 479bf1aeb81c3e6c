"""Every page and its rows: filling templates, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from harness.certify.certificate import Certificate
from harness.certify.lines import share
from harness.dashboard.view import CellView, environment_difference, short, sparkline
from harness.gate.findings import GateResult
from harness.gate.render import headline, waiver_lines
from harness.ledger.records import Run
from harness.report.naming import diagnosis_lines
from harness.report.record import DiagnosisRecord, DivergenceRecord
from harness.report.terminal import number, place

GLYPHS = {"conforms": "✔", "diverges": "▲", "not-proven": "?", "pass": "✔", "fail": "▲"}
_NEIGHBOURS = 2


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("harness.dashboard", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["share"] = share
    environment.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.0f} %"
    environment.filters["loss"] = lambda v: "–" if v is None else f"{v:.4f}"
    environment.globals["glyphs"] = GLYPHS
    return environment


def _render(template: str, **values: Any) -> str:
    return str(_environment().get_template(template).render(**values))


def overview(views: Sequence[CellView], gate: GateResult | None, runs: int) -> str:
    """Return the first page: targets x dtypes by checkpoints, and every run."""
    columns = list(dict.fromkeys((v.cell.target, v.cell.dtype) for v in views))
    rows: dict[tuple[str, str], dict[tuple[str, str], CellView]] = {}
    for view in views:
        key = (view.cell.subject, view.label)
        rows.setdefault(key, {})[view.cell.target, view.cell.dtype] = view
    return _render(
        "overview.html.jinja",
        root="",
        columns=sorted(columns),
        rows=rows,
        views=views,
        runs=runs,
        newest_first=sorted(
            ((run, view) for view in views for run in view.runs),
            key=lambda pair: (pair[0].created, pair[0].id),
            reverse=True,
        ),
        spark=sparkline,
        gate=gate,
        gate_line=headline(gate) if gate else "",
        waivers=[*waiver_lines(gate)] if gate else [],
    )


def run(run: Run, details: Mapping[str, Any], view: CellView, anchor: Run | None) -> str:
    """Return the page of one run."""
    report = details.get("report", {})
    found = report.get("first_divergence")
    diagnosis = report.get("diagnosis")
    at = next(index for index, one in enumerate(view.runs) if one.id == run.id)
    return _render(
        "run.html.jinja",
        root="../",
        run=run,
        view=view,
        report=report,
        found=found,
        place=place(DivergenceRecord(**found)) if found else "",
        diagnosis=[*diagnosis_lines(DiagnosisRecord(**diagnosis))] if diagnosis else [],
        worst=view.worst[at],
        before=view.runs[max(0, at - _NEIGHBOURS) : at],
        after=view.runs[at + 1 : at + 1 + _NEIGHBOURS],
        anchor=anchor,
        difference=environment_difference(run, anchor) if anchor else [],
        tokens=details.get("tokens", []),
        has_slopes=bool(details.get("slopes")),
        has_positions=bool(details.get("positions")),
    )


def run_rows(run: Run, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers behind the charts of a run."""
    report = details.get("report", {})
    return {
        "id": run.id,
        "verdict": run.verdict,
        "about": {
            "created": run.created[:19],
            "commit": run.commit,
            "subject": run.subject,
            "target": run.target,
            "dtype": run.dtype,
            "device": run.device,
            "driver": run.driver,
            "fault": run.fault,
            "checkpoint": run.checkpoint[:12],
            "certificate": run.certificate[:12],
            "factors": run.factors[:12],
            "inputs": run.inputs[:12],
            "seeds": ", ".join(f"{k} {v}" for k, v in run.seeds.items()),
            **run.environment,
        },
        "taps": [
            [
                tap["mode"],
                tap["layer"],
                tap["tap"],
                short(tap["ratio"]),
                tap["verdict"],
                tap["statistic"],
                short(tap["relative_error"]),
                tap["case"],
            ]
            for tap in report.get("taps", [])
        ],
        "slopes": [
            [slope["head"], slope["expected"], slope["measured"]]
            for slope in details.get("slopes", [])
        ],
        "positions": [
            [case["case"], [[at, short(kl)] for at, kl in case["kl"]]]
            for case in details.get("positions", [])
        ],
    }


def trend(views: Sequence[CellView]) -> str:
    """Return the page of any metric over the runs of a cell."""
    return _render("trend.html.jinja", root="", views=views)


def compare(views: Sequence[CellView]) -> str:
    """Return the page of two runs side by side."""
    return _render("compare.html.jinja", root="", views=views)


def certificate(certificates: Sequence[Certificate]) -> str:
    """Return the page of what the gate itself catches."""
    return _render("certificate.html.jinja", root="", certificates=certificates)


def certificate_rows(found: Certificate) -> dict[str, Any]:
    """Return the numbers behind the charts of a certificate."""
    return {
        "target": found.target,
        "kill": [
            {
                "area": area,
                "caught": rate.full.count,
                "of": rate.full.of,
                "percent": short(rate.full.percent),
            }
            for area, rate in [*found.kill.items(), ("all", found.total)]
        ],
        "rivals": [
            {
                "rule": rule,
                "kind": kind,
                "count": one.count,
                "of": one.of,
                "percent": short(one.percent),
            }
            for rule, kind, one in _rival_rows(found)
        ],
    }


def _rival_rows(found: Certificate) -> list[tuple[str, str, Any]]:
    from harness.certify.certificate import Share

    rows = []
    for rule, rival in found.rivals.items():
        rows.append((rule, "faults caught", rival.killed))
        rows.append((rule, "healthy flagged", rival.flagged))
    rows.append(("this gate", "faults caught", found.total.full))
    if found.healthy is not None:
        ours = Share(found.healthy.flagged, found.healthy.runs)
        rows.append(("this gate", "healthy flagged", ours))
    return rows
