"""Cells as lines of a file: a campaign that was cut short goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.peers.cell import Cell, Speed, plain

_KINDS: dict[str, Any] = {"cell": Cell, "speed": Speed}


class Record:
    """The cells and the speeds that are known.

    Parameters
    ----------
    path
        One JSON object a line; ``None`` keeps everything in memory.

    Raises
    ------
    BadInput
        If a line cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.cells: dict[tuple[str, str, str], Cell] = {}
        self.speeds: dict[tuple[str, int], Speed] = {}
        if path is None or not path.exists():
            return
        text = path.read_text()
        # The last line of a campaign that was ended may be half a line.
        whole, _, rest = text.rpartition("\n")
        if rest:
            path.write_text(whole + "\n" if whole else "")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._keep(_read(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(
                    f"is no record of `mpt-conform peers`: {error}", where=f"{path}:{number}"
                ) from error

    def _keep(self, value: Cell | Speed) -> None:
        if isinstance(value, Cell):
            self.cells[value.key] = value
        else:
            self.speeds[value.key] = value

    def add(self, values: Iterable[Cell | Speed]) -> None:
        """Keep results; the last one of a key counts."""
        lines = []
        for value in values:
            self._keep(value)
            kind = "cell" if isinstance(value, Cell) else "speed"
            lines.append(json.dumps({"kind": kind, **plain(value)}))
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def knows(self, key: tuple[str, str, str], versions: dict[str, str]) -> bool:
        """Return whether a cell was made with these versions."""
        return key in self.cells and self.cells[key].versions == versions


def _read(raw: dict[str, Any]) -> Cell | Speed:
    kind = _KINDS[raw.pop("kind")]
    for name in ("alike", "milliseconds"):
        if name in raw:
            raw[name] = tuple(raw[name])
    made: Cell | Speed = kind(**raw)
    return made
