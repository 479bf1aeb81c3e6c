"""Diagnosis through the command line, and with a fault held out of the library."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cases.synthetic import make_checkpoint
from harness.diagnose.inquiry import Diagnosis
from harness.diagnose.stage import diagnose
from harness.pipeline import Evidence, Request, check


def evidence(checkpoint: Path, ids: Path, fault: str) -> Evidence:
    kept: list[Evidence] = []
    request = Request(checkpoint=checkpoint, prompts=str(ids), fault=fault, diagnose=False)
    report = check(request, witness=kept.append)
    assert report.verdict == "diverges"
    assert report.diagnosis is None
    return kept[0]


def diagnosed(seen: Evidence, *excluded: str) -> Diagnosis:
    assert seen.inquiry is not None
    return diagnose(replace(seen.inquiry, excluded=frozenset(excluded)))


@pytest.mark.parametrize(
    "name", ["gelu-tanh@1", pytest.param("alibi-sign", marks=pytest.mark.long)]
)
def test_a_fault_is_named_and_held_out_it_is_none_of_these(
    name: str, checkpoint: Path, ids: Path
) -> None:
    seen = evidence(checkpoint, ids, name)
    plain, _, layer = name.partition("@")
    found = diagnosed(seen)
    assert found.fault == plain
    assert found.layer == int(layer or 0)
    assert found.coefficient == pytest.approx(1.0, abs=0.05)
    assert found.alike == ()
    without = diagnosed(seen, plain)
    assert without.fault is None
    assert "none of" in without.reason
    assert without.tried > 0


SOME_OF_A_PAST = (
    "decode-bias-absent",
    "chunk-mask-ignores-past",
    "decode-sees-first-slot-only",
    "padding-seen",
    "decode-writes-row-0",
    "caches-aliased",
    "same-bias-from-slot-0",
)


@pytest.mark.parametrize(
    "name",
    ["decode-sees-first-slot-only", pytest.param("decode-writes-row-0", marks=pytest.mark.long)],
)
def test_what_shows_over_a_cache_only_is_named(
    name: str, checkpoint: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a decode step the first looks like a mask that ignores the past: a chunk tells."""
    from harness.faults import library

    few = {known: library.library()[known] for known in SOME_OF_A_PAST}
    seen = evidence(checkpoint, ids, name)
    monkeypatch.setattr(library, "library", lambda: few)
    found = diagnosed(seen)
    assert (found.fault, found.layer, found.alike) == (name, None, ())
    assert found.tap.startswith("paths.")
    assert found.coefficient == pytest.approx(1.0, abs=0.05)
    assert found.tried == len(SOME_OF_A_PAST) - 1
    without = diagnosed(seen, name)
    assert without.fault is None
    assert "none of" in without.reason


def test_the_command_line_names_it_in_words_and_in_the_record(
    conform: Callable[..., Any], checkpoint: Path, ids: Path
) -> None:
    outcome = conform("check", checkpoint, "--prompts", ids, "--fault", "gelu-tanh@1", "--diagnose")
    assert outcome.code == 1
    found = outcome.report["diagnosis"]
    assert (found["fault"], found["layer"], found["layers"]) == ("gelu-tanh", 1, [1])
    assert "looks like gelu-tanh in layer 1" in outcome.out


def test_a_failure_of_the_diagnosis_does_not_hide_the_verdict(
    conform: Callable[..., Any], checkpoint: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("no compiler")

    # Templates that an earlier check has made would be found.
    monkeypatch.setattr("harness.diagnose.memory._memory", OrderedDict())
    monkeypatch.setattr("harness.diagnose.templates.library_steps", broken)
    outcome = conform("check", checkpoint, "--prompts", ids, "--fault", "gelu-tanh@1", "--diagnose")
    assert outcome.code == 1
    assert outcome.first["tap"] == "transformer.blocks.1.ffn.act"
    assert "RuntimeError: no compiler" in outcome.report["diagnosis"]["reason"]


def test_it_runs_on_divergence_only_and_can_be_left_out(
    conform: Callable[..., Any],
    checkpoint: Path,
    ids: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("diagnosed")

    monkeypatch.setattr("harness.pipeline.diagnose", never)
    assert conform("check", checkpoint, "--prompts", ids, "--diagnose").report["diagnosis"] is None
    outcome = conform(
        "check", checkpoint, "--prompts", ids, "--fault", "gelu-tanh@1", "--no-diagnose"
    )
    assert outcome.code == 1
    assert outcome.report["diagnosis"] is None


def test_a_fault_that_the_library_has_never_seen_is_none_of_these(
    conform: Callable[..., Any],
    made: Callable[..., str],
    checkpoint: Path,
    ids: Path,
) -> None:
    from harness.subjects.torch import load

    class Crooked:
        """A healthy torch model whose third feature of every context leans to one side."""

        protocol, name = 1, "crooked"

        def __init__(self, inner: Any) -> None:
            self._inner, self.dtype, self.rounding = inner, inner.dtype, inner.rounding

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def forward(self, input_ids: Any, lengths: Any = None) -> Any:
            return self._inner.forward(input_ids)

        def block(self, layer: int, hidden: Any) -> Any:
            taps = dict(self._inner.block(layer, hidden))
            taps["ffn.act"] = taps["ffn.act"].copy()
            taps["ffn.act"][..., 2] *= 1.25
            return taps

    name = made(lambda path, *, dtype, target: Crooked(load(path, dtype=dtype, target=target)))
    outcome = conform("check", checkpoint, "--prompts", ids, "--subject", name, "--diagnose")
    assert outcome.code == 1
    assert outcome.first["tap"] == "transformer.blocks.0.ffn.act"
    assert outcome.report["diagnosis"]["fault"] is None
    assert "none of the library's faults" in outcome.out


def test_what_shows_in_the_deployed_logits_alone_is_named(
    config_of: Callable[..., dict[str, Any]], ids: Path, tmp_path: Path
) -> None:
    config = config_of(n_layers=1, learned_pos_emb=True, attn={"alibi": False})
    model = make_checkpoint(tmp_path / "wpe", config, seed=0, dtype="bfloat16")
    seen = evidence(model, ids, "positions-not-added")
    found = diagnosed(seen)
    assert (found.fault, found.tap, found.alike) == ("positions-not-added", "logits", ())
    assert diagnosed(seen, "positions-not-added").fault is None
