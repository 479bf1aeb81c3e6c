"""What ``mpt-conform certify`` refuses before it runs anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.certify.campaign import factors_digest, stamp
from harness.certify.command import Options, make_certificate, split


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a campaign was started")

    monkeypatch.setattr("harness.certify.command.run", never)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "gelu-tnah"), "did you mean gelu-tanh?"),
        (("--only", "gelu-tanh", "--against", "nowhere.json"), "nowhere.json"),
        (("--only", "gelu-tanh", "--html", "/nowhere/page.html"), "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], said: str, conform: Callable[..., Any]
) -> None:
    outcome = conform("certify", *words)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_what_is_no_certificate_is_refused(conform: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    outcome = conform("certify", "--only", "gelu-tanh", "--against", file)
    assert outcome.code == 2
    assert "is no certificate" in outcome.err


def test_seeds_that_made_the_factors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.errors import BadInput

    monkeypatch.setattr("harness.certify.command.FIRST_SEED", 0)
    with pytest.raises(BadInput, match="prove nothing"):
        make_certificate(Options(seeds=3), lambda text: None)


def test_names_come_one_by_one_or_with_commas() -> None:
    assert split(["a,b", " c "]) == ("a", "b", "c")
    assert split(None) == ()


def test_results_belong_to_factors_and_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from harness.judge import factors

    assert stamp("llvm") == stamp("llvm") != stamp("cuda")
    before = factors_digest()
    (tmp_path / "factors.json").write_bytes(b"{}")
    monkeypatch.setattr(factors, "__file__", str(tmp_path / "factors.py"))
    assert factors_digest() != before
