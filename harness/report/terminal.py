"""The verdict for a terminal: what, where and by how much, then what was compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.evidence import evidence_line
from harness.report.naming import diagnosis_lines
from harness.report.record import DivergenceRecord, Report, TapRecord

_COLOURS = {"conforms": "bold green", "diverges": "bold red", "not-proven": "bold yellow"}
_MODES = ("alibi", "local", "teacher-forced", "free-running", "deployed")


def number(value: float | None) -> str:
    """Return a figure in three digits; what is not finite says so."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}"


def place(found: DivergenceRecord) -> str:
    """Return where the first divergence lies, in words."""
    parts = [found.tap]
    if found.tap == "alibi":
        parts.append("from layer 0 on")
    elif found.layer is not None:
        parts.append(f"layer {found.layer}")
    if found.head is not None:
        parts.append(f"head {found.head}")
    if found.token is not None and found.tap != "alibi":
        parts.append(f"token {found.token}")
    return ", ".join(parts)


def headline(report: Report) -> str:
    """Return the verdict as one line of plain text."""
    subject = report.subject
    fault = f" with fault {subject.fault}" if subject.fault else ""
    return f"{report.verdict}: {subject.name} {subject.dtype}{fault}"


def render(report: Report, console: Console) -> None:
    """Draw a report."""
    console.print(Text(headline(report), style=_COLOURS[report.verdict]))
    if report.reason:
        console.print(f"  {report.reason}", highlight=False)
    found = report.first_divergence
    if found is not None:
        console.print(Text(f"  first divergence: {place(found)}", style="bold"))
        if found.statistic:
            console.print(
                f"  {found.statistic} of the error is {number(found.observed)}, limit "
                f"{number(found.limit)} (units of expected rounding noise; {found.mode}, "
                f"case {found.case!r})",
                highlight=False,
            )
        if found.reason:
            console.print(f"  {found.reason}", highlight=False)
    if report.diagnosis is not None:
        for line in diagnosis_lines(report.diagnosis):
            console.print(f"  {line}", highlight=False)
    _tensors(report, console)
    console.print(_summary(report.taps))
    if found is not None:
        console.print(_worst(report.taps))
    _logits(report, console)
    _compared(report, console)
    console.print(f"  {evidence_line(report)}", highlight=False, soft_wrap=True)
    console.print(
        f"  {report.seconds:.1f} s; checkpoint {report.checkpoint.digest[:12]}; repeat with: "
        f"{report.reproduce}",
        highlight=False,
        soft_wrap=True,
    )


def _tensors(report: Report, console: Console) -> None:
    lost = [tensor for tensor in report.tensors if not tensor.arrived]
    for tensor in lost[:8]:
        console.print(f"  tensor {tensor.tensor}: {tensor.detail}", style="red", highlight=False)
    if len(lost) > 8:
        console.print(f"  and {len(lost) - 8} more tensors", style="red")


def _summary(taps: Sequence[TapRecord]) -> Table:
    table = Table(title="margin by mode", title_justify="left", box=None, pad_edge=False)
    for column in ("mode", "taps", "diverging", "closest to its limit", "of limit"):
        table.add_column(column, justify="left" if column in ("mode",) else "right")
    for mode in _MODES:
        mine = [tap for tap in taps if tap.mode == mode]
        if not mine:
            continue
        worst = max(mine, key=_severity)
        table.add_row(
            mode,
            str(len(mine)),
            str(sum(tap.verdict == "diverges" for tap in mine)),
            worst.tap,
            _percent(worst.ratio),
        )
    return table


def _severity(tap: TapRecord) -> float:
    if tap.ratio is None or math.isnan(tap.ratio):
        return math.inf
    return tap.ratio


def _percent(ratio: float | None) -> str:
    if ratio is None or not math.isfinite(ratio):
        return "beyond"
    return f"{100 * ratio:.0f} %" if ratio < 100 else f"{ratio:.3g} x"


def _worst(taps: Sequence[TapRecord], count: int = 6) -> Table:
    table = Table(
        title="first taps beyond their limits", title_justify="left", box=None, pad_edge=False
    )
    for column in ("tap", "mode", "statistic", "observed", "limit", "rel. error"):
        table.add_column(
            column, justify="left" if column in ("tap", "mode", "statistic") else "right"
        )
    diverging = [tap for tap in taps if tap.verdict == "diverges"]
    diverging.sort(key=lambda tap: _MODES.index(tap.mode))
    for tap in diverging[:count]:
        table.add_row(
            tap.tap,
            tap.mode,
            tap.statistic,
            number(tap.observed),
            number(tap.limit),
            number(tap.relative_error),
        )
    if len(diverging) > count:
        table.add_row(f"and {len(diverging) - count} more", "", "", "", "", "")
    return table


def _logits(report: Report, console: Console) -> None:
    if not report.logits:
        return
    positions = sum(record.positions for record in report.logits)
    agree = sum(record.top1_agree for record in report.logits)
    ties = sum(record.near_ties for record in report.logits)
    worst = max(record.kl_max for record in report.logits)
    console.print(
        f"  logits: best token agrees at {agree} of {positions} positions "
        f"({ties} of the rest are ties within the noise), largest KL {number(worst)} nats",
        highlight=False,
    )


def _compared(report: Report, console: Console) -> None:
    texts = [f"{name} {axis.compared}/{axis.expected}" for name, axis in report.compared.items()]
    console.print("  compared: " + ", ".join(texts), highlight=False, soft_wrap=True)
    for name, axis in report.compared.items():
        for skip in axis.skipped:
            console.print(f"  {name}: {skip.count} left out: {skip.reason}", highlight=False)
    if report.subject.lacks:
        lacks = ", ".join(report.subject.lacks)
        console.print(f"  the subject has no: {lacks}", highlight=False, soft_wrap=True)
    for note in report.checkpoint.notes:
        console.print(f"  {note}", highlight=False, soft_wrap=True)
    rounding = ", ".join(f"{k} {v}" for k, v in report.subject.rounding.items())
    console.print(f"  declared rounding: {rounding}", highlight=False, soft_wrap=True)
    cost = report.conversion
    if cost is not None:
        console.print(
            f"  weights {cost.source} -> {cost.target}: {cost.inexact} of {cost.elements} inexact, "
            f"{cost.flushed} flushed to zero, {cost.overflowed} overflowed",
            highlight=False,
        )
