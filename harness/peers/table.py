"""The table as Markdown, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from harness.peers.cell import OWN, Cell, Speed
from harness.peers.features import FEATURES
from harness.peers.healthy import PREFIX, alarms
from harness.subjects.peers.registry import PEERS
from harness.subjects.protocol import STORAGE_DTYPES

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
WRONG = ("diverges", "crashes")
"""States that are a fault of the peer."""
_ORDER = ("float32", "float16", "bfloat16")
_LONGEST = 160
"""Characters of a peer's own message that a table has room for; the data have more."""


def columns(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return the port, then the peers in the order of the registry, then those it does not know."""
    asked = tuple(dict.fromkeys(cell.peer for cell in cells))
    known = (OWN, *PEERS)
    return (*(n for n in known if n in asked), *(n for n in asked if n not in known))


def rows(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return the features that were asked, in the order of the list."""
    asked = {cell.feature for cell in cells}
    return tuple(name for name in FEATURES if name in asked)


def states(cells: Sequence[Cell], feature: str, peer: str) -> dict[str, tuple[str, ...]]:
    """Return state to dtypes, of one feature and one peer."""
    found: dict[str, tuple[str, ...]] = {}
    for dtype in _ORDER:
        for cell in cells:
            if cell.key == (peer, feature, dtype):
                found[cell.state] = (*found.get(cell.state, ()), SHORT[dtype])
    return found


def _words(found: dict[str, tuple[str, ...]]) -> str:
    if not found:
        return "–"
    return ", ".join(
        f"**{state}** {' '.join(dtypes)}" if state in WRONG else f"{state} {' '.join(dtypes)}"
        for state, dtypes in found.items()
    )


def findings(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Return peers with the cells that neither conform nor are out of reach, in row order."""
    place = {name: i for i, name in enumerate(FEATURES)}
    told = [
        cell for cell in cells if cell.state in ("diverges", "refuses", "crashes", "not proven")
    ]
    told = [cell for cell in told if cell.feature in place]
    told.sort(key=lambda c: (place[c.feature], STORAGE_DTYPES.index(c.dtype)))
    return [
        (peer, mine)
        for peer in columns(cells)
        if (mine := [cell for cell in told if cell.peer == peer])
    ]


def versions(cells: Sequence[Cell], peer: str) -> str:
    """Return a peer's packages in one line."""
    found: dict[str, str] = {}
    for cell in cells:
        if cell.peer == peer:
            found |= cell.versions
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _agreement(cell: Cell) -> str:
    parts = []
    if cell.logit_error is not None:
        parts.append(f"logits off by {cell.logit_error:.2g}")
    if cell.top1 is not None and cell.positions:
        parts.append(f"top-1 {cell.top1} of {cell.positions}")
    return "; ".join(parts)


def _cell(text: str) -> str:
    told = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return told.replace("|", "\\|").replace("\n", " ")


def markdown(cells: Sequence[Cell], speeds: Sequence[Speed]) -> str:
    """Return the whole result as Markdown."""
    peers, lines = columns(cells), []
    lines += ["| feature | " + " | ".join(peers) + " |", "|---|" + "---|" * len(peers)]
    for feature in rows(cells):
        words = [_words(states(cells, feature, peer)) for peer in peers]
        lines.append(f"| {feature} | " + " | ".join(words) + " |")
    lines += ["", "| peer | versions |", "|---|---|"]
    lines += [f"| {peer} | {versions(cells, peer)} |" for peer in peers]
    for peer, told in findings(cells):
        lines += ["", f"### {peer}", ""]
        lines += ["| feature | dtype | state | first tap | it looks like | logits |"]
        lines += ["|---|---|---|---|---|---|"]
        for cell in told:
            named = ", ".join(filter(None, (cell.fault, *cell.alike))) or cell.reason
            said = (cell.feature, cell.dtype, cell.state, cell.first, named, _agreement(cell))
            lines.append("| " + " | ".join(map(_cell, said)) + " |")
    counted = alarms(cells)
    if counted:
        lines += ["", "| peer | base config, other weights | flagged | at most, 95 % |"]
        lines += ["|---|---|---|---|"]
        for one in counted:
            share = f"{100 * one.at_most:.1f} %"
            lines.append(f"| {one.peer} | {one.cases} | {one.flagged} | {share} |")
    if speeds:
        lines += ["", "| peer | dtype | threads | ms a forward | fastest to slowest round |"]
        lines += ["|---|---|---|---|---|"]
        for speed in speeds:
            span = f"{min(speed.milliseconds):.1f} to {max(speed.milliseconds):.1f}"
            shown = (speed.peer, speed.dtype, str(speed.threads), f"{speed.median:.1f}", span)
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def to_plain(cells: Sequence[Cell], speeds: Sequence[Speed]) -> dict[str, Any]:
    """Return the whole result as plain data."""
    from harness.environment import environment
    from harness.peers.cell import plain

    return {
        "schema": 1,
        "features": {name: FEATURES[name].shows for name in rows(cells)},
        # Of the healthy cases their number is told, below.
        "cells": [plain(cell) for cell in cells if not cell.feature.startswith(PREFIX)],
        "alarms": [asdict(one) for one in alarms(cells)],
        "speeds": [{**plain(speed), "median": speed.median} for speed in speeds],
        "environment": environment(),
    }


def page(cells: Sequence[Cell], speeds: Sequence[Speed]) -> str:
    """Return the whole result as one page without a network or a script."""
    template = _environment().get_template("peers.html.jinja")
    return str(
        template.render(
            peers=columns(cells),
            features=[(name, FEATURES[name].shows) for name in rows(cells)],
            states=lambda feature, peer: states(cells, feature, peer),
            versions=lambda peer: versions(cells, peer),
            findings=findings(cells),
            agreement=_agreement,
            alarms=alarms(cells),
            speeds=speeds,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("harness.peers", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
