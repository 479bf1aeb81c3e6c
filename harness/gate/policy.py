"""``gate.toml``: what a release must prove, and what it may cost."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from harness.errors import BadInput
from harness.gate.drift import EVERY
from harness.ledger.records import Cell

SCHEMA = 1
_LARGEST = 36_500
"""Of any figure: a century in days, which is still a date."""


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint by name; ``path`` is needed for fresh runs, ``digest`` for recorded ones."""

    name: str
    digest: str
    path: str = ""


class Requirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cells that a release needs: every combination."""

    subject: str
    targets: list[str]
    dtypes: list[Literal["float16", "bfloat16", "float32"]]
    checkpoints: list[str]


class Runs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which runs speak for a release.

    With ``commit`` ``"same"`` only those of the commit that is released, and all of them: a
    divergence is not outvoted by a later success on the same commit. With ``factors`` ``"same"``
    only those that were judged by the limits of this very package. With ``prompts`` ``"shipped"``
    only those that ran the prompts of this package: a prompt of one token conforms without showing
    much. With ``max_age_days`` none that is older, and none of a time that is still to come.
    """

    commit: Literal["same", "any"] = "same"
    factors: Literal["same", "any"] = "same"
    prompts: Literal["shipped", "any"] = "any"
    max_age_days: float | None = None


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the certificate of a target must show."""

    file: str
    kill_percent: float = 100.0
    false_alarm_percent: float | None = None
    same_factors: bool = True


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a release may cost its users: a decision, no limit of rounding."""

    top1_beyond_ties: int | None = None
    perplexity_increase_percent: float | None = None


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How runs are held against the anchor, the rolling baseline and their own past."""

    anchor: Literal["required", "optional"] = "required"
    baseline_runs: int = 10
    false_alarm_every: int = EVERY


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    require: list[Requirement]
    checkpoint: list[Checkpoint]
    waivers: str = "waivers"
    runs: Runs = msgspec.field(default_factory=Runs)
    certificate: dict[str, Figures] = msgspec.field(default_factory=dict)
    budget: Budget = msgspec.field(default_factory=Budget)
    drift: Drift = msgspec.field(default_factory=Drift)


@dataclass(frozen=True)
class Required:
    """One cell that is required, under the checkpoint's name and with its path."""

    cell: Cell
    checkpoint: str
    path: Path | None

    def __str__(self) -> str:
        return f"{self.cell.subject} {self.cell.target} {self.cell.dtype} {self.checkpoint}"


@dataclass(frozen=True)
class Policy:
    """A policy that has been read; paths are those of the machine."""

    source: Path
    required: tuple[Required, ...]
    waivers: Path
    runs: Runs
    certificates: Mapping[str, tuple[Path, Figures]]
    budget: Budget
    drift: Drift
    content: Mapping[str, Any] = field(default_factory=dict)


def read_policy(path: Path) -> Policy:
    """Read ``gate.toml``; its paths start from its own folder.

    Raises
    ------
    BadInput
        If it is not there, cannot be read, asks for nothing, or names what it does not define.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        found = msgspec.convert(raw, _File)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"is no policy: {error}", where=str(path)) from error
    if found.schema != SCHEMA:
        raise BadInput(
            "has another layout", where=f"{path}: schema", expected=SCHEMA, found=found.schema
        )
    _require_numbers(found, path)
    if found.drift.baseline_runs < 1 or found.drift.false_alarm_every < 1:
        raise BadInput("must be at least 1", where=f"{path}: drift")
    home = path.parent
    return Policy(
        source=path,
        required=_required(found, path),
        waivers=home / found.waivers,
        runs=found.runs,
        certificates={
            target: (home / figures.file, figures) for target, figures in found.certificate.items()
        },
        budget=found.budget,
        drift=found.drift,
        content=raw,
    )


def _require_numbers(found: _File, path: Path) -> None:
    """Refuse figures that nothing can miss: a NaN is neither above a limit nor below it."""
    budget = found.budget
    # A budget for perplexity may be negative: then a release must gain. No loss is below -100 %.
    figures: list[tuple[str, float | None, int]] = [
        ("runs: max_age_days", found.runs.max_age_days, 0),
        ("budget: top1_beyond_ties", budget.top1_beyond_ties, 0),
        ("budget: perplexity_increase_percent", budget.perplexity_increase_percent, -100),
    ]
    for target, one in found.certificate.items():
        figures.append((f"certificate.{target}: kill_percent", one.kill_percent, 0))
        figures.append((f"certificate.{target}: false_alarm_percent", one.false_alarm_percent, 0))
    for name, value, least in figures:
        if value is not None and not (math.isfinite(value) and least <= value <= _LARGEST):
            raise BadInput(
                "is no figure",
                where=f"{path}: {name}",
                expected=f"{least} to {_LARGEST}",
                found=value,
            )


def _required(found: _File, path: Path) -> tuple[Required, ...]:
    named = {checkpoint.name: checkpoint for checkpoint in found.checkpoint}
    for checkpoint in found.checkpoint:
        if len(checkpoint.digest) != 64 or set(checkpoint.digest) - set("0123456789abcdef"):
            raise BadInput(
                "is no digest",
                where=f"{path}: checkpoint {checkpoint.name}",
                expected="64 hexadecimal digits, as a report shows them",
                found=repr(checkpoint.digest),
            )
    if len(named) < len(found.checkpoint) or len({c.digest for c in named.values()}) < len(named):
        raise BadInput("names a checkpoint twice", where=f"{path}: checkpoint")
    cells: dict[Cell, Required] = {}
    for need in found.require:
        for name in need.checkpoints:
            if name not in named:
                raise BadInput(
                    "names a checkpoint that is not defined",
                    where=f"{path}: require",
                    expected=", ".join(named) or "a [[checkpoint]]",
                    found=name,
                )
            one = named[name]
            place = path.parent / one.path if one.path else None
            for target in need.targets:
                for dtype in need.dtypes:
                    cell = Cell(need.subject, target, dtype, one.digest)
                    cells[cell] = Required(cell, name, place)
    if not cells:
        raise BadInput(
            "requires nothing", where=str(path), hint="a gate without a cell proves nothing"
        )
    for target in found.certificate:
        if target not in {cell.target for cell in cells}:
            raise BadInput(
                "is of a target that nothing requires", where=f"{path}: certificate.{target}"
            )
    return tuple(cells.values())
