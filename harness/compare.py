"""``compare``: two dumps or two records of ``check`` against each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import BadInput

_SHOWN = 12


@dataclass(frozen=True)
class Judged:
    """One dump against the golden of a checkpoint."""

    path: str
    verdict: str
    first_divergence: str


@dataclass(frozen=True)
class DumpRow:
    """One tap of one case in two dumps.

    Attributes
    ----------
    same
        Equal bit by bit; across dtypes, equal in value.
    differing, elements
        Elements that differ, of how many.
    largest
        Largest absolute difference.
    noise
        Root mean square of the difference in units of the expected rounding noise; ``None`` without
        a checkpoint to know the noise from.
    note
        What else sets them apart, such as a shape.
    """

    case: str
    tap: str
    same: bool
    differing: int
    elements: int
    largest: float | None
    noise: float | None = None
    note: str = ""

    def line(self) -> str:
        """Return the row as text."""
        text = f"{self.case}/{self.tap}: "
        if self.note:
            return text + self.note
        noise = "" if self.noise is None else f", {self.noise:.3g} of the expected noise (rms)"
        largest = "not finite" if self.largest is None else f"by up to {self.largest:.3g}"
        return text + f"{self.differing} of {self.elements} elements differ, {largest}{noise}"


@dataclass(frozen=True)
class RecordRow:
    """One tap in one mode in two records of ``check``.

    Attributes
    ----------
    a, b
        Error over limit; ``None`` where it is not finite or the record lacks the tap.
    a_verdict, b_verdict
        ``conforms``, ``diverges`` or ``absent``.
    """

    tap: str
    mode: str
    a: float | None
    b: float | None
    a_verdict: str
    b_verdict: str

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return (self.a, self.a_verdict) == (self.b, self.b_verdict)

    def line(self) -> str:
        """Return the row as text."""
        sides = ((self.a, self.a_verdict), (self.b, self.b_verdict))
        a, b = (
            verdict if verdict == "absent" else "beyond" if ratio is None else f"{ratio:.3g}"
            for ratio, verdict in sides
        )
        worse = ""
        if self.a_verdict != self.b_verdict:
            worse = f"  {self.a_verdict} -> {self.b_verdict}"
        return f"{self.tap} ({self.mode}): {a} -> {b} of the limit{worse}"


@dataclass(frozen=True)
class Comparison:
    """Two files against each other.

    Attributes
    ----------
    verdict
        ``conforms``, ``diverges`` or ``not-proven``.
    kind
        ``dumps`` or ``records``.
    reason
        The verdict in one sentence.
    rows
        What both hold, in order of evaluation.
    only_a, only_b
        What one of them lacks.
    judged
        Each dump's own verdict, where a checkpoint was given.
    """

    verdict: str
    kind: str
    reason: str
    a: str
    b: str
    rows: tuple[DumpRow, ...] | tuple[RecordRow, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the comparison as lines of text."""
        yield f"{self.verdict}: {self.reason}"
        for side in self.judged:
            first = f", first at {side.first_divergence}" if side.first_divergence else ""
            yield f"  {side.path} {side.verdict}{first}"
        for path, names in ((self.a, self.only_a), (self.b, self.only_b)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                yield f"  only in {path}: {', '.join(names[:3])}{more}"
        apart = [row for row in self.rows if not row.same]
        # A changed verdict first; otherwise in order of evaluation.
        apart.sort(key=lambda row: isinstance(row, RecordRow) and row.a_verdict == row.b_verdict)
        for row in apart[:_SHOWN]:
            yield f"  {row.line()}"
        if len(apart) > _SHOWN:
            yield f"  and {len(apart) - _SHOWN} more"
        yield f"  compared: {len(self.rows)} taps, {len(apart)} of them apart"


def compare_files(a: Path, b: Path, checkpoint: Path | None) -> Comparison:
    """Compare two dumps, or two records of ``check``.

    Parameters
    ----------
    a, b
        Files of one kind; for records, ``b`` is the newer one.
    checkpoint
        Where two dumps differ, what each of them is judged on: a difference alone has no limit.

    Raises
    ------
    BadInput
        If the files cannot be read or compared, or are one and the same.
    """
    kinds = [_kind(path) for path in (a, b)]
    if os.path.samefile(a, b):
        raise BadInput(
            "a file compared with itself shows nothing",
            where=f"{a} and {b}",
            expected="two files of two runs",
        )
    if kinds[0] != kinds[1]:
        raise BadInput(
            "a dump cannot be compared with a record",
            where=f"{a} and {b}",
            expected="two of one kind",
            found=f"a {kinds[0]} and a {kinds[1]}",
        )
    if kinds[0] == "record":
        from harness.compare_records import compare_records

        if checkpoint is not None:
            raise BadInput("has no effect on records of check", where="--checkpoint")
        return compare_records(a, b)
    from harness.compare_dumps import compare_dumps

    return compare_dumps(a, b, checkpoint)


def _kind(path: Path) -> str:
    """Tell a dump from a record: a safetensors length has zero bytes, JSON has none."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(path)) from error
    if start[8:9] == b"{" and b"\0" in start[:8]:
        return "dump"
    if start.lstrip()[:1] == b"{":
        return "record"
    raise BadInput(
        "neither a dump nor a record of check",
        where=str(path),
        expected="safetensors or JSON",
        found="an empty file" if not start else f"a file that begins with {start[:8]!r}",
    )
