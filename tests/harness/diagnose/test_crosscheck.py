"""A fault is named if the whole block looks like it, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.certify.planting import checkpoint_of, prompt
from harness.diagnose import stage
from harness.diagnose.inquiry import Diagnosis, Inquiry
from harness.faults.library import library
from harness.pipeline import Request, check


def inquiry(name: str, folder: Path) -> Inquiry:
    kept: list[Inquiry | None] = []
    exposure = library()[name].exposure
    request = Request(
        checkpoint=checkpoint_of(exposure),
        prompts=str(prompt(exposure, folder)),
        fault=name,
        diagnose=False,
    )
    check(request, witness=lambda evidence: kept.append(evidence.inquiry))
    assert kept[0] is not None
    return kept[0]


# What is planted and left out of the library, and what its first tap alone looks like then.
LOOKALIKES = {
    "linear-biases-ignored": "biases-ignored",
    "qk-ln-on-queries-only": "qk-ln-ignored",
}


DEAR = "linear-biases-ignored"
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name == DEAR)) for name in LOOKALIKES]


@pytest.fixture
def credulous(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A diagnosis that looks at one tap."""
    with monkeypatch.context() as patched:
        patched.setattr(stage, "borne_out", lambda *given: True)
        yield


def without(found: Inquiry, name: str) -> Diagnosis:
    return stage.diagnose(replace(found, excluded=frozenset({name})))


@pytest.mark.parametrize("name", NAMES)
def test_the_other_taps_of_a_block_speak_against_a_lookalike(name: str, tmp_path: Path) -> None:
    found = inquiry(name, tmp_path)
    assert stage.diagnose(found).fault == name
    assert without(found, name).fault is None


@pytest.mark.usefixtures("credulous")
@pytest.mark.parametrize("name", NAMES)
def test_one_tap_alone_would_be_taken_in(name: str, tmp_path: Path) -> None:
    assert without(inquiry(name, tmp_path), name).fault == LOOKALIKES[name]


NEEDS_THE_STORAGE_DTYPE = "embedding-times-root"
OF_OTHER_SIZES_TOO = "key-heads-as-one"
"""Its config makes some faults want weights of sizes that the checkpoint does not have."""


@pytest.mark.parametrize(
    "name", [pytest.param(NEEDS_THE_STORAGE_DTYPE, marks=pytest.mark.long), OF_OTHER_SIZES_TOO]
)
def test_it_is_named(name: str, tmp_path: Path) -> None:
    found = stage.diagnose(inquiry(name, tmp_path))
    assert (found.fault, found.alike) == (name, ())
