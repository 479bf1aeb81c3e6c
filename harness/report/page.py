"""The record of a check as one self-contained page: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from harness.report.evidence import evidence_line
from harness.report.naming import diagnosis_lines
from harness.report.record import Report, TapRecord
from harness.report.terminal import headline, number, place

_MODES = {
    "local": "Each step alone, from the subject's own inputs to it",
    "teacher-forced": "Each block from the golden stream, steps chained inside it",
    "free-running": "Chained from the token ids, as users see it",
    "deployed": "The deployed forward",
    "alibi": "The bias, as the attention applies it",
}
# Upper ends of the shades, as parts of the limit. Only the shade follows from them: whether a tap
# diverges stands in the record, and is drawn as a mark and a border beside the number.
_SHADES = (0.25, 0.5, 0.75, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Cell:
    """One tap of one layer: the text, its shade, and what stands behind the number."""

    text: str
    shade: int
    diverges: bool
    detail: str


@dataclass(frozen=True)
class HeatMap:
    """Error over limit of one mode: layers by taps, in order of evaluation; ``None``: not there."""

    mode: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def page(report: Report) -> str:
    """Return a report as HTML; every text from outside is escaped."""
    found = report.first_divergence
    return str(
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            headline=headline(report),
            found=found,
            place=place(found) if found else "",
            diagnosis=[*diagnosis_lines(report.diagnosis)] if report.diagnosis else [],
            maps=[*_block_maps(report.taps), *_end_maps(report.taps)],
            lost=[tensor for tensor in report.tensors if not tensor.arrived],
            shades=_legend(),
            evidence=evidence_line(report),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("harness.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["loss"] = lambda value: (
        "–" if value is None or value != value else f"{value:.4f}"
    )
    return environment


def _block_maps(taps: Sequence[TapRecord]) -> list[HeatMap]:
    """Return a map of layers by taps for every mode that looked into blocks."""
    maps = []
    for mode, meaning in _MODES.items():
        mine = [tap for tap in taps if tap.mode == mode and tap.layer is not None]
        if not mine:
            continue
        cells = {(tap.layer, _within(tap)): _cell(tap) for tap in mine}
        columns = tuple(dict.fromkeys(_within(tap) for tap in mine))
        layers = dict.fromkeys(tap.layer for tap in mine)
        rows = tuple(
            (f"{layer}", tuple(cells.get((layer, column)) for column in columns))
            for layer in layers
        )
        maps.append(HeatMap(mode, meaning, columns, rows))
    return maps


def _end_maps(taps: Sequence[TapRecord]) -> list[HeatMap]:
    """Return one map of modes by taps for what lies outside the blocks."""
    mine = [tap for tap in taps if tap.layer is None]
    if not mine:
        return []
    cells = {(tap.mode, tap.tap): _cell(tap) for tap in mine}
    columns = tuple(dict.fromkeys(tap.tap for tap in mine))
    modes = [mode for mode in _MODES if any(tap.mode == mode for tap in mine)]
    rows = tuple((mode, tuple(cells.get((mode, column)) for column in columns)) for mode in modes)
    return [HeatMap("", "Outside the blocks", columns, rows)]


def _within(tap: TapRecord) -> str:
    return tap.tap.split(f".{tap.layer}.", 1)[-1]


def _cell(tap: TapRecord) -> Cell:
    ratio = math.inf if tap.ratio is None or math.isnan(tap.ratio) else tap.ratio
    shade = sum(ratio > end for end in _SHADES)
    detail = (
        f"{tap.tap}: {tap.statistic} {number(tap.observed)}, limit {number(tap.limit)} of the "
        f"expected noise; worst of {tap.cases} cases: {tap.case}"
    )
    return Cell(_figure(ratio), shade, tap.verdict == "diverges", detail)


def _figure(ratio: float) -> str:
    if math.isinf(ratio):
        return "∞"
    if ratio < 10:
        return f"{ratio:.2f}"
    return f"{ratio:.0f}" if ratio < 10000 else f"{ratio:.0e}".replace("e+0", "e")


def _legend() -> list[tuple[int, str]]:
    ends = [f"{end:g}" for end in _SHADES]
    texts = [f"up to {ends[0]}"] + [f"{a} to {b}" for a, b in pairwise(ends)]
    return list(enumerate([*texts, f"beyond {ends[-1]}"]))
