"""A gate's result as table, JSON, JUnit and Markdown: drawn, never decided."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.gate.findings import CellResult, Finding, GateResult
from harness.report.files import plain

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WORDS = {"pass": "pass", "fail": "BLOCKED", "not-proven": "NOT PROVEN"}
_COLOURS = {"pass": "bold green", "fail": "bold red", "not-proven": "bold yellow"}


def headline(result: GateResult) -> str:
    """Return the outcome in one line."""
    blocked = sum(cell.state != "pass" for cell in result.cells) + sum(
        finding.blocks for finding in result.general
    )
    total = len(result.cells)
    commit = f" at {result.commit[:12]}" if result.commit else ""
    if result.state == "pass":
        return f"pass: {result.release}{commit}, {total} of {total} cells"
    return f"{_WORDS[result.state]}: {result.release}{commit}, {blocked} of {total} cells and files"


def render(result: GateResult, console: Console) -> None:
    """Draw the result for a terminal."""
    console.print(Text(headline(result), style=_COLOURS[result.state]))
    table = Table(box=None, pad_edge=False)
    for column in ("cell", "state", "check", "finding"):
        table.add_column(column, overflow="fold")
    for cell in result.cells:
        shown = [f for f in cell.findings if f.state != "pass"] or [cell.findings[0]]
        for at, finding in enumerate(shown):
            first = (cell.name, _WORDS[cell.state]) if at == 0 else ("", "")
            table.add_row(*map(Text, (*first, finding.check, finding.text)))
    for finding in result.general:
        table.add_row(*map(Text, ("", _WORDS[finding.state], finding.check, finding.text)))
    console.print(table)
    for line in waiver_lines(result):
        console.print(Text(line))


def waiver_lines(result: GateResult) -> Iterator[str]:
    """Yield every waiver there is: none may be forgotten."""
    used = {f.waiver for cell in result.cells for f in cell.findings if f.waived}
    for waiver in result.waivers:
        use = "in use" if waiver.file in used else "not in use"
        yield (
            f"waiver {waiver.file}: {waiver.check} of {waiver.subject} {waiver.target} "
            f"{waiver.dtype} {waiver.checkpoint}, until {waiver.expires}, {waiver.owner}: "
            f"{waiver.reason} ({use})"
        )


def to_plain(result: GateResult) -> dict[str, Any]:
    """Return the result as plain data, with what is derived from it."""
    found: dict[str, Any] = plain(result)
    found["state"] = result.state
    for cell, source in zip(found["cells"], result.cells, strict=True):
        cell["state"] = source.state
    for waiver in found["waivers"]:
        waiver["expires"] = waiver["expires"].isoformat()
    return found


def junit(result: GateResult) -> bytes:
    """Return JUnit XML: one testcase a cell, findings and the repro command in the failure."""
    suite = ElementTree.Element("testsuite", name=f"mpt-conform gate {result.release}")
    suite.set("timestamp", result.made)
    loose = [finding for finding in result.general if finding.blocks]
    states = [cell.state for cell in result.cells]
    suite.set("tests", str(len(states) + len(loose)))
    every = [*states, *(finding.state for finding in loose)]
    suite.set("failures", str(every.count("fail")))
    suite.set("errors", str(every.count("not-proven")))
    for cell in result.cells:
        seconds = f"{cell.run.seconds:.3f}" if cell.run else "0"
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=cell.name)
        case.set("time", seconds)
        if cell.state != "pass":
            # What was not proven is no failure of the subject's; both make a pipeline red.
            kind = "failure" if cell.state == "fail" else "error"
            blocking = [finding for finding in cell.findings if finding.blocks]
            problem = ElementTree.SubElement(
                case, kind, type=cell.state, message=_one_line(blocking)
            )
            lines = [f"{finding.check}: {finding.text}" for finding in blocking]
            problem.text = "\n".join([*lines, f"repeat with: {cell.reproduce}"])
        waived = [f"{f.check}: {f.text}" for f in cell.findings if f.waived]
        if waived:
            ElementTree.SubElement(case, "system-out").text = "\n".join(waived)
    for finding in loose:
        case = ElementTree.SubElement(suite, "testcase", classname="gate")
        case.set("name", finding.waiver or "evidence")
        kind = "failure" if finding.state == "fail" else "error"
        problem = ElementTree.SubElement(case, kind, type=finding.state, message=finding.text)
        problem.text = finding.text
    for element in suite.iter():
        # A message of a device may carry signs that no XML can, escaped or not.
        element.text = _ILLEGAL.sub("\ufffd", element.text) if element.text else element.text
        for name, text in element.attrib.items():
            element.set(name, _ILLEGAL.sub("\ufffd", text))
    ElementTree.indent(suite)
    content: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _one_line(findings: list[Finding]) -> str:
    return "; ".join(f"{finding.check}: {finding.text}" for finding in findings)


def markdown(result: GateResult) -> str:
    """Return a summary for the step page of a pipeline."""
    mark = {"pass": "✅", "fail": "❌", "not-proven": "❔"}
    lines = [f"## {mark[result.state]} Gate {_escape(headline(result))}", ""]
    lines += ["| cell | state | findings |", "|---|---|---|"]
    for cell in result.cells:
        shown = [f for f in cell.findings if f.state != "pass"]
        text = "<br>".join(f"**{f.check}**: {_escape(f.text)}" for f in shown) or _margin(cell)
        lines.append(f"| {_escape(cell.name)} | {mark[cell.state]} {_WORDS[cell.state]} | {text} |")
    for finding in result.general:
        lines.append(f"| {finding.check} | {mark[finding.state]} | {_escape(finding.text)} |")
    blocked = [cell for cell in result.cells if cell.state != "pass"]
    if blocked:
        lines += ["", "Repeat with:", "", "```console"]
        lines += [f"$ {cell.reproduce}" for cell in blocked]
        lines.append("```")
    lines += [f"\n- {_escape(line)}" for line in waiver_lines(result)]
    return "\n".join(lines) + "\n"


def _margin(cell: CellResult) -> str:
    return _escape(next((f.text for f in cell.findings if f.check == "verdict"), ""))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
