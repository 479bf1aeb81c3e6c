"""Greedy reduction of independent fields, smallest values first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Reduction:
    """What came of a reduction.

    Attributes
    ----------
    fields
        The smallest values that were found to fail.
    tried
        Trials run.
    complete
        Whether another pass would change nothing; ``False`` if the trials ran out.
    """

    fields: Fields
    tried: int
    complete: bool


def reduce_fields(
    start: Fields,
    smaller: Callable[[Fields, str], Sequence[Any]],
    fails: Callable[[Fields], bool],
    most: int,
) -> Reduction:
    """Return the smallest values of every field under which ``fails`` still holds.

    All fields at their smallest are tried at once first: most faults survive that, and it saves
    the way down. Then field by field, the smallest value first, until a pass changes nothing.

    Parameters
    ----------
    start
        Fails.
    smaller
        From all fields and the name of one to values smaller than its own, smallest first.
    fails
        Whether the same failure is there. It is asked no combination twice.
    most
        Trials at most.
    """
    known: dict[tuple[Any, ...], bool] = {}

    def ask(fields: Fields) -> bool | None:
        key = tuple(repr(fields[name]) for name in start)
        if key not in known:
            if len(known) >= most:
                return None
            known[key] = fails(fields)
        return known[key]

    current = dict(start)
    least = dict(start)
    for name in start:
        values = smaller(least, name)
        least[name] = values[0] if values else least[name]
    if least != current and ask(least):
        current = least
    changed = True
    while changed:
        changed = False
        for name in start:
            for value in smaller(current, name):
                answer = ask({**current, name: value})
                if answer is None:
                    return Reduction(current, len(known), False)
                if answer:
                    current[name] = value
                    changed = True
                    break
    return Reduction(current, len(known), True)
