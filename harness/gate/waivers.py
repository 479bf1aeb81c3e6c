"""Waivers: files that let a finding pass for a time, with a reason and somebody's role."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import msgspec

from harness.errors import BadInput

CHECKS = ("run", "verdict", "anchor", "baseline", "drift", "top1", "perplexity", "certificate")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str
    owner: str
    expires: date
    check: str
    subject: str
    target: str
    dtype: str
    checkpoint: str


@dataclass(frozen=True)
class Waiver:
    """One finding of one cell that may pass until a day.

    Attributes
    ----------
    file
        Its name.
    reason, owner
        Why, and which role answers for it.
    expires
        The last day it holds, UTC.
    check, subject, target, dtype, checkpoint
        The finding; no field may be left open, and none is a pattern.
    """

    file: str
    reason: str
    owner: str
    expires: date
    check: str
    subject: str
    target: str
    dtype: str
    checkpoint: str

    def expired(self, today: date) -> bool:
        """Whether its last day is over."""
        return today > self.expires


def read_waivers(folder: Path) -> tuple[Waiver, ...]:
    """Read every ``*.toml`` of a folder; none if there is no such folder.

    Raises
    ------
    BadInput
        If one cannot be read, or says no reason or owner.
    """
    found = []
    for path in sorted(folder.glob("*.toml")):
        try:
            raw = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
            raise BadInput(f"is no waiver: {e}", where=str(path)) from e
        if raw.check not in CHECKS:
            raise BadInput(
                "names no check",
                where=f"{path}: check",
                expected=", ".join(CHECKS),
                found=repr(raw.check),
            )
        for name in ("reason", "owner"):
            if not getattr(raw, name).strip():
                raise BadInput("is empty", where=f"{path}: {name}")
        found.append(Waiver(file=path.name, **msgspec.structs.asdict(raw)))
    return tuple(found)


def covering(
    waivers: Sequence[Waiver], *, check: str, subject: str, target: str, dtype: str, checkpoint: str
) -> Waiver | None:
    """Return the waiver of one finding, the one that holds longest; ``checkpoint`` by its name."""
    wanted = (check, subject, target, dtype, checkpoint)
    mine = [w for w in waivers if (w.check, w.subject, w.target, w.dtype, w.checkpoint) == wanted]
    return max(mine, key=lambda waiver: waiver.expires, default=None)
