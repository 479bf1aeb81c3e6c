"""Commands that measure the gate itself, and other people's models by it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import DTYPES, JsonOption, dtype_name
from harness.errors import EXIT_CONFORMS, EXIT_DIVERGES, BadInput


def faults() -> None:
    """List the faults that `check --fault` can plant."""
    from rich.console import Console
    from rich.table import Table

    from harness.faults.library import library

    table = Table(box=None, pad_edge=False)
    for column in ("name", "area", "first tap", "shown by", "what it is"):
        table.add_column(column, overflow="fold")
    for fault in library().values():
        table.add_row(fault.name, fault.area, fault.first_tap, fault.exposure, fault.summary)
    Console().print(table)


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the factors are written.")],
    seeds: Annotated[str, typer.Option(help="FIRST:LAST, each a random checkpoint.")] = "0:120",
    processes: Annotated[int, typer.Option(min=1, help="Seeds judged at once.")] = 1,
) -> None:
    """Measure how far healthy implementations lie beyond the legitimate orders."""
    from harness.calibrate import calibrate as run
    from harness.report.files import to_json, write_whole

    first, colon, last = seeds.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise BadInput("cannot be read", where="--seeds", expected="FIRST:LAST", found=repr(seeds))
    chosen = range(int(first), int(last))
    factors = run(chosen, lambda text: typer.echo(text, err=True), processes)
    write_whole(output, to_json(factors))


def certify(
    target: Annotated[str, typer.Option(help="Of the planted faults.")] = "llvm",
    dtype: Annotated[str, typer.Option(callback=dtype_name)] = "float16",
    sample: Annotated[
        int, typer.Option(min=1, help="Run every n-th fault and healthy checkpoint only.")
    ] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Run these faults only, and no healthy subject.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=0, help="Healthy checkpoints; many by default.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep results here, and go on from those that are there.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A certificate whose figures must not fall.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = 2,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """Measure how many faults the gate catches and how often it cries wolf."""
    from harness.certify.command import SEEDS, Options, make_certificate, split
    from harness.certify.lines import lines
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, html):
        if place is not None:
            require_writable(place)
    count = SEEDS if seeds is None else seeds
    options = Options(target, dtype, sample, split(only), count, record, against, processes)
    made, worse = make_certificate(options, lambda text: typer.echo(text, err=True))
    if json is not None:
        write_whole(json, to_json(made))
    if html is not None:
        from harness.certify.page import page

        write_whole(html, page(made).encode())
    for line in (*lines(made), *(f"fell: {text}" for text in worse)):
        typer.echo(line)
    raise typer.Exit(EXIT_DIVERGES if worse else EXIT_CONFORMS)


def certificate(
    target: Annotated[str, typer.Argument(help="llvm, or another that was measured.")] = "llvm",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Only the table of published rules.")
    ] = False,
) -> None:
    """Show the certificate that came with the package."""
    from harness.certify.certificate import shipped_certificate
    from harness.certify.lines import lines, table

    found = shipped_certificate(target)
    typer.echo(table(found) if markdown else "\n".join(lines(found)))


def peers(
    only: Annotated[
        list[str] | None, typer.Option(help="These only; `relax` is the port. All by default.")
    ] = None,
    feature: Annotated[list[str] | None, typer.Option(help="These features only.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="These storage dtypes only.")] = None,
    healthy: Annotated[
        int, typer.Option(min=0, help="Instead, ask the base config with so many other weights.")
    ] = 0,
    speed: Annotated[
        int, typer.Option(min=0, help="Instead, time so many forwards of each, in turns.")
    ] = 0,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="With --speed.")] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="PEER=INTERPRETER, with --speed: a peer of another environment."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --speed: wait for a line before the clock starts.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Keep answers here, and go on from those that are there.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Ask nothing, show the record.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = 1,
    json: JsonOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """Put every installed MPT through the gate, feature by feature, and draw the table."""
    from harness.peers.command import Options, answer, summary
    from harness.peers.table import markdown as drawn
    from harness.peers.table import page, to_plain
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, markdown, html):
        if place is not None:
            require_writable(place)
    pairs = [text.partition("=") for text in python or ()]
    if any(not name or not path for name, _, path in pairs):
        raise BadInput("cannot be read", where="--python", expected="PEER=INTERPRETER")
    options = Options(
        only=tuple(only or ()),
        features=tuple(feature or ()),
        dtypes=tuple(dtype_name(text) for text in dtype) if dtype else DTYPES,
        healthy=healthy,
        speed=speed,
        threads=tuple(threads or (1, 2)),
        pythons={name: path for name, _, path in pairs},
        record=record,
        processes=processes,
        show=show,
    )

    def ready() -> None:
        if wait:
            typer.echo("ready", err=True)
            sys.stdin.readline()

    cells, speeds = answer(options, lambda text: typer.echo(text, err=True), ready)
    text = drawn(cells, speeds)
    if json is not None:
        write_whole(json, to_json(to_plain(cells, speeds)))
    if markdown is not None:
        write_whole(markdown, text.encode())
    if html is not None:
        write_whole(html, page(cells, speeds).encode())
    typer.echo(text, nl=False)
    if summary(cells):
        typer.echo(summary(cells))
