"""Two records of ``check``: where the second one is worse than the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.checkpoint.strict_json import read_object
from harness.compare import Comparison, RecordRow
from harness.errors import BadInput
from harness.report.record import SCHEMA


@dataclass(frozen=True)
class _Tap:
    tap: str
    mode: str
    verdict: str
    ratio: float | None
    elements: int


@dataclass(frozen=True)
class _Subject:
    name: str
    dtype: str


@dataclass(frozen=True)
class _Checkpoint:
    digest: str


@dataclass(frozen=True)
class _Record:
    """What a comparison needs of a record; the rest of it is left alone."""

    schema: int
    verdict: str
    subject: _Subject
    checkpoint: _Checkpoint
    taps: tuple[_Tap, ...]


def compare_records(a: Path, b: Path) -> Comparison:
    """Compare tap by tap.

    ``diverges`` where ``b`` diverges and ``a`` does not; ``conforms`` only if ``b`` conforms and
    has looked at everything that ``a`` has.

    Raises
    ------
    BadInput
        If a file is no record of this version, or they are of two checkpoints or dtypes.
    """
    old, new = _read(a), _read(b)
    for what, first, second in (
        ("checkpoints", old.checkpoint.digest[:12], new.checkpoint.digest[:12]),
        ("storage dtypes", old.subject.dtype, new.subject.dtype),
    ):
        if first != second:
            raise BadInput(
                f"the records are of two {what}",
                where=f"{a} and {b}",
                expected=f"{first} in both",
                found=second,
            )
    taps_a = {(tap.tap, tap.mode): tap for tap in old.taps}
    taps_b = {(tap.tap, tap.mode): tap for tap in new.taps}
    rows = tuple(_row(key, taps_a.get(key), taps_b.get(key)) for key in {**taps_a, **taps_b})
    verdict, reason = _verdict(old, new, rows, taps_a, taps_b)
    return Comparison(
        verdict=verdict,
        kind="records",
        reason=reason,
        a=str(a),
        b=str(b),
        rows=rows,
        only_a=tuple(f"{tap} ({mode})" for tap, mode in taps_a if (tap, mode) not in taps_b),
        only_b=tuple(f"{tap} ({mode})" for tap, mode in taps_b if (tap, mode) not in taps_a),
    )


_Key = tuple[str, str]


def _verdict(
    old: _Record,
    new: _Record,
    rows: tuple[RecordRow, ...],
    taps_a: dict[_Key, _Tap],
    taps_b: dict[_Key, _Tap],
) -> tuple[str, str]:
    if not taps_a.keys() & taps_b.keys():
        return "not-proven", "the records have no tap in common"
    worse = [r for r in rows if r.b_verdict == "diverges" and r.a_verdict != "diverges"]
    if worse:
        first = f"{worse[0].tap} ({worse[0].mode})"
        return "diverges", f"{len(worse)} taps diverge that did not, first {first}"
    if new.verdict == "diverges" and old.verdict != "diverges":
        return "diverges", "a call failed or a tensor was lost that was not before"
    if new.verdict != "conforms":
        return "not-proven", f"nothing got worse, but the second run itself is: {new.verdict}"
    less = [k for k, tap in taps_a.items() if k not in taps_b or taps_b[k].elements < tap.elements]
    if less:
        return "not-proven", f"the second run looked at less: {len(less)} taps, first {less[0][0]}"
    if old.verdict == "diverges":
        return "conforms", "the second run conforms where the first one diverged"
    return "conforms", f"no tap of {len(rows)} is beyond its limit in the second run"


def _row(key: _Key, a: _Tap | None, b: _Tap | None) -> RecordRow:
    tap, mode = key
    return RecordRow(
        tap=tap,
        mode=mode,
        a=a.ratio if a else None,
        b=b.ratio if b else None,
        a_verdict=a.verdict if a else "absent",
        b_verdict=b.verdict if b else "absent",
    )


def _read(path: Path) -> _Record:
    raw = read_object(path)
    if raw.get("schema") != SCHEMA:
        raise BadInput(
            "not a record of this version of check",
            where=f"{path}: schema",
            expected=SCHEMA,
            found=repr(raw.get("schema")),
        )
    try:
        record = msgspec.convert(raw, _Record)
    except msgspec.ValidationError as error:
        raise BadInput(f"not a record of check: {error}", where=str(path)) from error
    if not record.taps:
        raise BadInput("the record holds no taps", where=str(path))
    return record
