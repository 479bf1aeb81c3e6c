"""``mpt-conform ledger`` and ``mpt-conform anchor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ledger_app = typer.Typer(help="List, export and import the runs of a ledger.", no_args_is_help=True)
anchor_app = typer.Typer(help="Pin the runs that others are held against.", no_args_is_help=True)

LedgerOption = Annotated[
    str, typer.Option("--ledger", help="A file, or postgresql://user@host/database.")
]


@ledger_app.command("list")
def list_(ledger: LedgerOption) -> None:
    """List the runs, oldest first."""
    from harness.ledger.store import Ledger

    with Ledger.open(ledger) as opened:
        for run in opened.runs():
            fault = f" fault {run.fault}" if run.fault else ""
            typer.echo(f"{run.id}  {run.verdict:10}  {run.commit[:12]:12}  {run.cell}{fault}")


@ledger_app.command("export")
def export_(
    folder: Annotated[Path, typer.Argument(help="Folder of Parquet tables to make.")],
    ledger: LedgerOption,
) -> None:
    """Write a ledger as Parquet tables."""
    from harness.ledger.parquet import export
    from harness.ledger.store import Ledger

    with Ledger.open(ledger) as opened:
        count = export(opened, folder)
    typer.echo(f"{folder}: {count} runs")


@ledger_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of Parquet tables, or a ledger file.")],
    ledger: LedgerOption,
) -> None:
    """Add the runs of another ledger; those that are there already stay as they are."""
    from harness.ledger.exchange import take_in

    added, known = take_in(source, ledger)
    typer.echo(f"{ledger}: {added} runs added, {known} were there")


@anchor_app.command("set")
def set_(
    runs: Annotated[list[str], typer.Argument(help="Ids of runs, or their beginnings.")],
    ledger: LedgerOption,
    reason: Annotated[str, typer.Option(help="Why these runs are accepted.")],
    release: Annotated[str, typer.Option(help="Name of the release.")] = "",
) -> None:
    """Pin runs as the anchors of their cells; drift is reckoned from them."""
    from harness.ledger.exchange import pin

    for anchor in pin(ledger, runs, reason=reason, release=release):
        typer.echo(f"{anchor.run}  {anchor.cell}")


@anchor_app.command()
def show(ledger: LedgerOption) -> None:
    """Show the anchor in force of every cell."""
    from harness.ledger.store import Ledger

    with Ledger.open(ledger) as opened:
        for cell, anchor in opened.current_anchors().items():
            words = " ".join(part for part in (anchor.release, anchor.reason) if part)
            typer.echo(f"{anchor.run}  {cell}  pinned {anchor.pinned[:19]}  {words}")
