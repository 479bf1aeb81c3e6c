"""Commands of a release: gate and report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import EXIT_OF, JsonOption, Progress
from harness.errors import BadInput


def gate(
    ledger: Annotated[str, typer.Option(help="A file, or a database URL.")],
    release: Annotated[str, typer.Option(help="Name of the release, for the reports.")],
    policy: Annotated[Path, typer.Option(help="What a release must prove.")] = Path("gate.toml"),
    commit: Annotated[
        str | None, typer.Option(help="What is released; that of this directory by default.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make the runs that are missing, and record them.")
    ] = False,
    json: JsonOption = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Append a summary here, as to $GITHUB_STEP_SUMMARY.")
    ] = None,
) -> None:
    """Hold a release's policy against the ledger: what is not proven blocks."""
    from rich.console import Console

    from harness.gate import render
    from harness.gate.command import gate as run
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, junit, markdown):
        if place is not None:
            require_writable(place)
    progress = Progress()
    try:
        result = run(policy, ledger, release=release, commit=commit, fresh=fresh, progress=progress)
    finally:
        progress.stop()
    if json is not None:
        write_whole(json, to_json(render.to_plain(result)))
    if junit is not None:
        write_whole(junit, render.junit(result))
    if markdown is not None:
        try:
            with markdown.open("a", encoding="utf-8") as file:
                file.write(render.markdown(result))
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", where=str(markdown)) from error
    width = None if sys.stdout.isatty() else 160
    render.render(result, Console(width=width, highlight=False))
    raise typer.Exit(EXIT_OF[result.verdict])


def report(
    out: Annotated[Path, typer.Option(help="Folder of pages to make or to replace.")],
    ledger: Annotated[str, typer.Option(help="A file, or a database URL.")],
    policy: Annotated[
        Path | None, typer.Option(help="Show the gate of this policy and its waivers, too.")
    ] = None,
) -> None:
    """Build the dashboard: pages that open from disk, without a network."""
    from harness.dashboard.build import build

    made = build(ledger, out, policy)
    typer.echo(f"{made.index}: {made.runs} runs, {made.pages} pages, {made.seconds:.1f} s")
