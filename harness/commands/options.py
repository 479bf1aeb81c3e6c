"""What commands share: options, progress and the exit code of a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.errors import EXIT_CONFORMS, EXIT_DIVERGES, EXIT_NOT_PROVEN, BadInput

EXIT_OF = {"conforms": EXIT_CONFORMS, "diverges": EXIT_DIVERGES, "not-proven": EXIT_NOT_PROVEN}
DTYPES = ("float16", "bfloat16", "float32")

CheckpointArgument = Annotated[
    Path | None, typer.Argument(help="Directory in the hub layout; the shipped one by default.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the whole record here.")]


def dtype_name(value: str) -> str:
    """Return a storage dtype's name, or refuse it as a usage error."""
    if value not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}, found {value!r}")
    return value


def layer_set(value: str | None) -> frozenset[int] | None:
    """Return the layers of ``0,3-5``."""
    if value is None:
        return None
    chosen: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise BadInput("cannot be read", where="--layers", expected="0,3-5", found=repr(value))
        chosen.update(range(int(first), int(last or first) + 1))
    return frozenset(chosen)


class Progress:
    """A line that overwrites itself on a terminal, and nothing elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status: Any = None

    def __call__(self, text: str) -> None:
        """Show what is being done now."""
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        self._status.update(text)

    def stop(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()


def finish(result: Any, json: Path | None) -> None:
    """Write a result, print its lines, and end with the exit code of its verdict."""
    from harness.report.files import to_json, write_whole

    if json is not None:
        write_whole(json, to_json(result))
    for line in result.lines():
        typer.echo(line)
    raise typer.Exit(EXIT_OF[result.verdict])
