"""What a conversion to float16 did, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.checkpoint.rounding import Counts
from harness.errors import BadInput


@dataclass(frozen=True)
class ConvertedTensor:
    """One tensor before conversion, and what conversion did to its elements."""

    name: str
    dtype: str
    elements: int
    counts: Counts


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of a conversion.

    Attributes
    ----------
    source, target
        The directories read and written.
    shards
        Names of the shards that make up the result.
    kept_shards
        Those of `shards` that an earlier, interrupted run had finished and that were verified.
    side_files
        Relative names of the files copied beside the weights.
    tensors
        Every tensor in the order of the checkpoint.
    bytes_read, bytes_written
        Tensor bytes converted from, and whole shards written, by this run.
    seconds
        Wall time of this run.
    """

    source: Path
    target: Path
    shards: tuple[str, ...]
    kept_shards: tuple[str, ...]
    side_files: tuple[str, ...]
    tensors: tuple[ConvertedTensor, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    totals: Counts = field(init=False)

    def __post_init__(self) -> None:
        """Sum up the tensors."""
        object.__setattr__(self, "totals", sum((t.counts for t in self.tensors), Counts()))

    @property
    def affected(self) -> tuple[ConvertedTensor, ...]:
        """The tensors of which some element did not stay exactly what it was."""
        return tuple(t for t in self.tensors if t.counts)

    @property
    def elements(self) -> int:
        """Number of elements in all tensors."""
        return sum(t.elements for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold; only affected tensors are listed."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "shards": list(self.shards),
            "kept_shards": list(self.kept_shards),
            "side_files": list(self.side_files),
            "tensors": len(self.tensors),
            "elements": self.elements,
            "totals": asdict(self.totals),
            "affected": [
                {"name": t.name, "dtype": t.dtype, "elements": t.elements, **asdict(t.counts)}
                for t in self.affected
            ],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
        }

    def lines(self) -> Iterator[str]:
        """The report as lines of text: affected tensors, then totals."""
        for tensor in self.affected:
            yield f"{tensor.name}: {_sentence(tensor.counts)} of {tensor.elements} elements"
        yield (
            f"{len(self.tensors)} tensors, {self.elements} elements: "
            f"{_sentence(self.totals) if self.totals else 'every one exact'}"
        )


def _sentence(counts: Counts) -> str:
    named = {
        "overflowed to infinity": counts.overflowed,
        "flushed to zero": counts.flushed,
        "inexact": counts.inexact,
        "not finite before": counts.not_finite,
    }
    return ", ".join(f"{n} {what}" for what, n in named.items() if n)


class ConversionRefused(BadInput):
    """Weights are infinite or NaN in float16; the result was not put under its name.

    Attributes
    ----------
    report
        What would have been written.
    """

    def __init__(self, report: ConversionReport, partial: Path) -> None:
        self.report = report
        bad = [t for t in report.tensors if t.counts.overflowed or t.counts.not_finite]
        number = report.totals.overflowed + report.totals.not_finite
        super().__init__(
            f"{number} weights in {len(bad)} tensors are not finite in float16, "
            f"first in {bad[0].name!r}",
            where=str(report.source),
            expected="magnitudes below 65520, which float16 can hold",
            found=_sentence(bad[0].counts),
            hint=f"--allow-overflow accepts this; the finished shards wait in {partial}",
        )
