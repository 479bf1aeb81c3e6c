"""Whether a checkpoint is checked whole or block by block: the rule, and what it is asked of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import forecast
from harness.forecast import size
from harness.measure.run import Case
from harness.memory import Room, room


@dataclass(frozen=True)
class Need:
    """Bytes that a check will take at its peak, an upper bound, the reference included.

    Attributes
    ----------
    whole
        With every weight of the subject in memory.
    streamed
        With one layer of it at a time.
    """

    whole: int
    streamed: int

    @classmethod
    def of(
        cls, config: Any, topology: Mapping[str, Sequence[int]], cases: Sequence[Case], dtype: str
    ) -> Need:
        """Forecast a check of a model on cases in a storage dtype."""
        reference = forecast.memory(config, topology, cases)
        return cls(
            reference + forecast.whole(config, topology, dtype),
            reference + forecast.streamed(topology, dtype),
        )


@dataclass(frozen=True)
class Choice:
    """How a checkpoint is checked.

    Attributes
    ----------
    stream
        Block by block.
    note
        For the report, empty for a check of the whole model.
    sentence
        What it will take, beforehand.
    """

    stream: bool
    note: str
    sentence: str


def choose(asked: bool | None, can: bool, need: Need, left: Room | None = None) -> Choice:
    """Choose: as asked, else whole if that fits into what is left, else block by block.

    Parameters
    ----------
    asked
        ``--stream`` or ``--no-stream``; ``None`` for neither.
    can
        Whether the subject can hold one layer at a time.
    need, left
        Memory; by default what `room` says is left for this process.
    """
    left = room() if left is None else left
    stream = asked if asked is not None else can and need.whole > left.free
    takes = need.streamed if stream else need.whole
    sentence = f"this will take at most about {size(takes)}"
    if takes > left.free:
        sentence += f", and {size(left.free)} are left ({left.limit}): --max-tokens makes it less"
    note = ""
    if stream:
        why = (
            "as --stream asks"
            if asked
            else f"for the whole would take up to {size(need.whole)}, and {size(left.free)} were "
            f"left ({left.limit})"
        )
        note = f"weights were read block by block, {why}; the forward was run layer by layer"
    return Choice(stream, note, sentence)
