"""``mpt-conform``: the program, from its words to an exit code."""

from __future__ import annotations

import sys

import typer

from harness.allocator import keep_freed_memory
from harness.commands import checking, evidence, models, release
from harness.errors import (
    EXIT_CONFORMS,
    EXIT_INTERNAL,
    EXIT_NOT_PROVEN,
    ConformanceError,
    out_of_memory,
    ran_out_of_memory,
)
from harness.ledger.commands import anchor_app, ledger_app

app = typer.Typer(
    help="Is it still MPT? Judge an implementation against a float64 reference, layer by layer.\n\n"
    "Exit codes: 0 conforms, 1 diverges, 2 bad input or usage, 3 not proven, 70 internal error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    checking.check,
    models.build,
    release.gate,
    release.report,
    checking.trace,
    checking.compare,
    models.convert,
    models.topology,
    models.map_,
    evidence.faults,
    evidence.calibrate,
    evidence.certify,
    evidence.peers,
    evidence.certificate,
    models.generate,
    checking.shrink,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(ledger_app, name="ledger")
app.add_typer(anchor_app, name="anchor")


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, never in a traceback."""
    keep_freed_memory()
    try:
        # Outside standalone mode an Exit comes back as a number, or raised, as versions please.
        code = app(prog_name="mpt-conform", standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except ConformanceError as error:
        print(f"mpt-conform: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if ran_out_of_memory(error):
            print(f"mpt-conform: {out_of_memory('this machine')}", file=sys.stderr)
            sys.exit(EXIT_NOT_PROVEN)
        _unexpected(error)
    else:
        sys.exit(code if isinstance(code, int) else EXIT_CONFORMS)


def _unexpected(error: Exception) -> None:
    """Show usage errors as such, and anything else as the internal error it is."""
    import traceback

    show = getattr(error, "show", None)
    if callable(show):
        show()
        sys.exit(getattr(error, "exit_code", 2))
    traceback.print_exc()
    print(
        f"mpt-conform: internal error: {type(error).__name__}: {error} "
        "(this is a bug of mpt-conformance, please report it)",
        file=sys.stderr,
    )
    sys.exit(EXIT_INTERNAL)
