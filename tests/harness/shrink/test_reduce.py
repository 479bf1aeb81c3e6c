"""Greedy reduction on predicates that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harness.shrink.reduce import reduce_fields

START = {"layers": 9, "heads": 12, "tokens": 50}


def smaller(fields: Mapping[str, Any], name: str) -> Sequence[int]:
    return range(1, fields[name])


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 50))
def test_it_finds_the_least_of_every_field(layers: int, heads: int, tokens: int) -> None:
    def fails(fields: Mapping[str, Any]) -> bool:
        least = {"layers": layers, "heads": heads, "tokens": tokens}
        return all(fields[name] >= least[name] for name in START)

    found = reduce_fields(START, smaller, fails, 1000)
    assert found.fields == {"layers": layers, "heads": heads, "tokens": tokens}
    assert found.complete


def test_what_fails_at_the_smallest_takes_one_trial() -> None:
    found = reduce_fields(START, smaller, lambda fields: True, 1000)
    assert set(found.fields.values()) == {1}
    assert found.tried == 1


def test_fields_that_depend_on_each_other_are_tried_again() -> None:
    # Layers can only go down once there are few heads.
    def fails(fields: Mapping[str, Any]) -> bool:
        return bool(fields["heads"] >= 3 and (fields["layers"] >= 5 or fields["heads"] <= 4))

    found = reduce_fields(START, smaller, fails, 1000)
    assert found.fields == {"layers": 1, "heads": 3, "tokens": 1}


def test_nothing_is_tried_twice_and_trials_run_out() -> None:
    seen: list[tuple[Any, ...]] = []

    def fails(fields: Mapping[str, Any]) -> bool:
        seen.append(tuple(fields.values()))
        return bool(fields["tokens"] >= 40)

    found = reduce_fields(START, smaller, fails, 10)
    assert len(seen) == len(set(seen)) == found.tried == 10
    assert not found.complete
    assert found.fields["tokens"] >= 40


def test_what_cannot_be_made_smaller_stays() -> None:
    found = reduce_fields(START, smaller, lambda fields: fields == START, 1000)
    assert found.fields == START
    assert found.complete
