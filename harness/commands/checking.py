"""Commands that judge: check, trace, compare, shrink."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands.options import (
    EXIT_OF,
    CheckpointArgument,
    JsonOption,
    Progress,
    dtype_name,
    finish,
    layer_set,
)


def check(
    checkpoint: CheckpointArgument = None,
    subject: Annotated[
        str,
        typer.Option(
            help="relax, torch, transformers, peer:NAME, or module:factory (runs that code)."
        ),
    ] = "relax",
    dtype: Annotated[str, typer.Option(callback=dtype_name, help="Storage dtype.")] = "float16",
    target: Annotated[str, typer.Option(help="llvm, cuda, or a TVM target as JSON.")] = "llvm",
    prompts: Annotated[
        str | None, typer.Option(help="Prompt file or directory: .txt, .json or .npy ids.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Judge this dump of taps (safetensors) instead of a subject."),
    ] = None,
    fault: Annotated[
        str | None, typer.Option(help="Plant a fault: NAME or NAME@LAYER; see `faults`.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Judge these layers only: 0,3-5.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut every prompt after so many tokens.")
    ] = None,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    diagnose: Annotated[
        bool, typer.Option(help="After a divergence, name the fault that it looks like.")
    ] = True,
    ledger: Annotated[
        str | None, typer.Option(help="Add the run to this ledger: a file, or a database URL.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Use this compiled model; see `build`.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            help="Hold one block's weights at a time, from disk; if the model does not fit, anyway."
        ),
    ] = None,
) -> None:
    """Judge a subject on a checkpoint and say where it first diverges."""
    from rich.console import Console

    from harness.pipeline import SHIPPED, Request
    from harness.pipeline import check as run
    from harness.report.evidence import with_evidence
    from harness.report.files import require_writable, to_json, write_whole
    from harness.report.terminal import render

    for place in (json, html):
        if place is not None:
            require_writable(place)
    request = Request(
        checkpoint=checkpoint or SHIPPED,
        subject=subject,
        dtype=dtype,
        target=target,
        prompts=prompts,
        traces=traces,
        fault=fault,
        layers=layer_set(layers),
        max_tokens=max_tokens,
        diagnose=diagnose,
        bundle=bundle,
        stream=stream,
    )
    progress = Progress()
    try:
        report = run(request, progress) if ledger is None else _recorded(ledger, request, progress)
    finally:
        progress.stop()
    report = with_evidence(report)
    if json is not None:
        write_whole(json, to_json(report))
    if html is not None:
        from harness.report.page import page

        write_whole(html, page(report).encode())
    # A file or a pipe has no width: nothing is cut there.
    width = None if sys.stdout.isatty() else 160
    render(report, Console(width=width, highlight=False))
    raise typer.Exit(EXIT_OF[report.verdict])


def _recorded(ledger: str, request: Any, progress: Any) -> Any:
    """Check, and write the run; a ledger that cannot be used is refused before the work."""
    from harness.ledger.record import check_into
    from harness.ledger.store import Ledger

    with Ledger.open(ledger, write=True) as opened:
        return check_into(opened, request, progress)


def trace(
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file to write.")],
    checkpoint: CheckpointArgument = None,
    subject: Annotated[str, typer.Option(help="As in check.")] = "relax",
    dtype: Annotated[str, typer.Option(callback=dtype_name)] = "float16",
    target: Annotated[str, typer.Option()] = "llvm",
    prompts: Annotated[str | None, typer.Option()] = None,
    fault: Annotated[str | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Dump every tap of a subject, to be judged elsewhere with `check --traces`."""
    from harness.dump import write_dump
    from harness.pipeline import SHIPPED, Request

    request = Request(
        checkpoint=checkpoint or SHIPPED,
        subject=subject,
        dtype=dtype,
        target=target,
        prompts=prompts,
        fault=fault,
        max_tokens=max_tokens,
    )
    progress = Progress()
    try:
        written = write_dump(request, output, progress)
    finally:
        progress.stop()
    typer.echo(f"{output}: {written} tensors")


def compare(
    a: Annotated[Path, typer.Argument(help="A dump (.safetensors) or a record of check (.json).")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint that two differing dumps are judged on.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare two dumps or two runs; limits come from the checkpoint, never from a tolerance."""
    from harness.compare import compare_files
    from harness.report.files import require_writable

    if json is not None:
        require_writable(json)
    result = compare_files(a, b, checkpoint)
    finish(result, json)


def shrink(
    output: Annotated[Path, typer.Option("--output", "-o", help="Script to write.")],
    checkpoint: CheckpointArgument = None,
    subject: Annotated[str, typer.Option(help="As in check.")] = "relax",
    dtype: Annotated[str, typer.Option(callback=dtype_name)] = "float16",
    target: Annotated[str, typer.Option()] = "llvm",
    prompts: Annotated[str | None, typer.Option()] = None,
    fault: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Make a failing check small, and write a script that repeats it."""
    from harness.pipeline import SHIPPED, Request
    from harness.report.files import require_writable
    from harness.shrink.command import lines, write
    from harness.shrink.command import shrink as run

    require_writable(output)
    progress = Progress()
    try:
        shrunk = run(
            Request(
                checkpoint=checkpoint or SHIPPED,
                subject=subject,
                dtype=dtype,
                target=target,
                prompts=prompts,
                fault=fault,
            ),
            progress,
        )
    finally:
        progress.stop()
    write(shrunk, output)
    for line in (*lines(shrunk), f"python {output}"):
        typer.echo(line)
