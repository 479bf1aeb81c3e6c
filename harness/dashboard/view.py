"""From a ledger to what the pages show: cells, series, alarms and differences, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.gate.drift import EVERY, alarms
from harness.gate.evaluate import History, drift_series
from harness.ledger.records import OF_LIMIT, Anchor, Cell, Run, Value

BASELINE_RUNS = 10
_IDENTITY = ("commit", "device", "driver", "certificate", "factors")


@dataclass(frozen=True)
class CellView:
    """One cell: its runs, oldest first, with the worst error over limit of each.

    Attributes
    ----------
    worst
        ``None`` where a value is not finite or there is none.
    drifting
        Sentences, one an alarm that stands; ``marks`` are index and series of every alarm.
    """

    number: int
    cell: Cell
    label: str
    runs: tuple[Run, ...]
    worst: tuple[float | None, ...]
    anchor: Anchor | None
    drifting: tuple[str, ...]
    marks: tuple[tuple[int, str], ...]

    @property
    def newest(self) -> Run:
        """The run that the cell is judged by."""
        return self.runs[-1]

    @property
    def margin(self) -> str:
        """What is left to the limit, as a part of it, or how often the error holds the limit."""
        last = self.worst[-1]
        if last is None:
            return "not finite"
        return f"margin {100 * (1 - last):.0f} %" if last <= 1.0 else f"{last:.3g} times its limit"


def cell_views(
    runs: Sequence[Run], values: Mapping[str, Sequence[Value]], anchors: Mapping[Cell, Anchor]
) -> list[CellView]:
    """Return one view per cell, in order of checkpoint, subject, target and dtype."""
    groups: dict[Cell, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.cell, []).append(run)
    order = sorted(groups, key=lambda c: (c.checkpoint, c.subject, c.target, c.dtype))
    views = []
    for number, cell in enumerate(order):
        mine = groups[cell]
        anchor = anchors.get(cell)
        history = History(mine, values, anchor)
        since, series = drift_series(history, mine[-1])
        every = alarms(series, EVERY, standing=False)
        position = {run.id: at for at, run in enumerate(mine)}
        standing = {alarm.series for alarm in alarms(series, EVERY)}
        views.append(
            CellView(
                number=number,
                cell=cell,
                label=checkpoint_label(mine[-1]),
                runs=tuple(mine),
                worst=tuple(worst(values.get(run.id, ())) for run in mine),
                anchor=anchor,
                drifting=tuple(
                    f"{a.series}: {a.first:.3g} of its limit in the beginning, {a.last:.3g} now"
                    for a in every
                    if a.series in standing
                ),
                marks=tuple((position[since[a.at].id], a.series) for a in every),
            )
        )
    return views


def checkpoint_label(run: Run) -> str:
    """Return a checkpoint's name for people: its folder, and enough of the digest."""
    return f"{run.checkpoint_path.rstrip('/').rpartition('/')[2]} {run.checkpoint[:8]}"


def worst(values: Sequence[Value]) -> float | None:
    """Return the largest error over limit of a run."""
    found = [value.value for value in values if value.metric == OF_LIMIT]
    if not found or any(value is None for value in found):
        return None
    return max(value for value in found if value is not None)


@dataclass(frozen=True)
class Series:
    """One metric of one mode in one cell: by tap a value per run, and the rolling baseline."""

    mode: str
    metric: str
    taps: Mapping[str, tuple[float | None, ...]]
    baselines: Mapping[str, tuple[float | None, ...]]


def cell_series(view: CellView, values: Mapping[str, Sequence[Value]]) -> list[Series]:
    """Return every series of a cell, grouped by mode and metric."""
    count = len(view.runs)
    found: dict[tuple[str, str], dict[str, list[float | None]]] = {}
    for at, run in enumerate(view.runs):
        for value in values.get(run.id, ()):
            taps = found.setdefault((value.mode, value.metric), {})
            taps.setdefault(value.tap, [None] * count)[at] = value.value
    good = [run.verdict == "conforms" for run in view.runs]
    return [
        Series(
            mode,
            metric,
            {tap: tuple(column) for tap, column in taps.items()},
            {tap: rolling_median(column, good) for tap, column in taps.items()},
        )
        for (mode, metric), taps in sorted(found.items())
    ]


def rolling_median(
    column: Sequence[float | None], good: Sequence[bool]
) -> tuple[float | None, ...]:
    """Return before each run the median of the last runs that conform; ``None`` before any."""
    kept: list[float] = []
    found: list[float | None] = []
    for value, fine in zip(column, good, strict=True):
        found.append(median(kept[-BASELINE_RUNS:]) if kept else None)
        if fine and value is not None:
            kept.append(value)
    return tuple(found)


def environment_difference(run: Run, other: Run) -> list[tuple[str, str, str]]:
    """Return what identifies two runs and differs: name, other's, this run's."""
    found = [(name, getattr(other, name), getattr(run, name)) for name in _IDENTITY]
    names = dict.fromkeys([*other.environment, *run.environment])
    found += [(n, other.environment.get(n, ""), run.environment.get(n, "")) for n in names]
    return [(name, before or "–", now or "–") for name, before, now in found if before != now]


def short(value: float | None) -> float | None:
    """Return a number in four digits, as the pages carry them; ``None`` if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def sparkline(points: Sequence[float | None], width: int = 120, height: int = 28) -> str:
    """Return the points of an SVG polyline: error over limit, the limit at the upper edge.

    What is beyond the limit, or not finite, is drawn at the edge.
    """
    recent = list(points)[-60:]
    # A line of one point would not be seen.
    recent = recent * 2 if len(recent) == 1 else recent
    step = width / max(len(recent) - 1, 1)
    return " ".join(
        f"{at * step:.1f},{height - 2 - (height - 4) * min(1.0 if y is None else y, 1.0):.1f}"
        for at, y in enumerate(recent)
    )
