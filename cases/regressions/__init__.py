"""Shrunk cases that once failed, or that pin a corner; tests replay them before anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases.strategies import Case

HERE = Path(__file__).resolve().parent
_FIELDS = ("config", "seed", "ids", "note")


class RegressionError(ValueError):
    """A regression file cannot be used; the message names file and field."""


@dataclass(frozen=True)
class Regression:
    """One kept case.

    Attributes
    ----------
    name
        The file's stem.
    case
        Config, seed of the weights and token ids.
    note
        What went wrong, or could.
    """

    name: str
    case: Case
    note: str


def load_regressions(directory: Path = HERE) -> tuple[Regression, ...]:
    """Every ``*.json`` of the folder, in the order of their names.

    Raises
    ------
    RegressionError
        No file at all, JSON that does not parse, or a field missing, unknown or of a wrong type.
    """
    files = sorted(directory.glob("*.json"))
    if not files:
        raise RegressionError(f"{directory}: expected regression files (*.json), found none")
    return tuple(_load(file) for file in files)


def save_regression(name: str, case: Case, note: str, directory: Path = HERE) -> Path:
    """Keep a case, as Hypothesis shrank it; refuses to replace another."""
    file = directory / f"{name}.json"
    body = {"note": note, "seed": case.seed, "ids": case.ids, "config": case.config}
    with file.open("x") as stream:
        stream.write(json.dumps(body, indent=2) + "\n")
    return file


def _load(file: Path) -> Regression:
    def refuse(field: str, expected: str, found: Any) -> RegressionError:
        return RegressionError(f"{file}: {field}: expected {expected}, found {found!r}")

    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RegressionError(f"{file}: {error}") from error
    if not isinstance(raw, dict) or set(raw) != set(_FIELDS):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise refuse("file", f"an object of exactly {', '.join(_FIELDS)}", found)
    if not isinstance(raw["config"], dict):
        raise refuse("config", "an object", raw["config"])
    if not _natural(raw["seed"]):
        raise refuse("seed", "an integer, 0 or more", raw["seed"])
    if not isinstance(raw["note"], str) or not raw["note"]:
        raise refuse("note", "what the case is for", raw["note"])
    ids = raw["ids"]
    if not (
        isinstance(ids, list)
        and ids
        and all(isinstance(row, list) and row and len(row) == len(ids[0]) for row in ids)
        and all(_natural(value) for row in ids for value in row)
    ):
        raise refuse("ids", "rows of equally many token ids, at least one", ids)
    return Regression(
        file.stem, Case(raw["config"], raw["seed"], tuple(map(tuple, ids))), raw["note"]
    )


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
