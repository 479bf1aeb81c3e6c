"""Which roundings are faults, and which become legitimate by being declared.

The decision and its reasons stand in ``harness.faults.precision``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.synthetic import make_checkpoint
from harness.calibrate import OrderSubject
from harness.pipeline import SHIPPED, Request, check
from harness.report.record import Report
from harness.subjects.protocol import Rounding
from reference.orders import Order, Sum

WIDE = Rounding(scores="float32", probabilities="float32")
NARROW = Rounding(scores="float32", probabilities="float32", accumulator="float16")


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Check a fault under a declaration, on text that the model was trained for."""
    from tokenizers import Tokenizer

    import cases.prompts

    text = Path(cases.prompts.__file__).with_name("long.txt").read_text()
    tokens = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids
    prompts = tmp_path / "ids.npy"
    np.save(prompts, np.array(tokens[:48]))

    def run(fault: str | None, declared: Rounding) -> Report:
        places = dataclasses.asdict(declared)
        monkeypatch.setattr("relax_impl.compile.default_roundings", lambda *_: places)
        return check(Request(prompts=str(prompts), fault=fault, diagnose=False))

    return run


def place(report: Report) -> str | None:
    return report.first_divergence.tap if report.first_divergence else None


def test_accumulation_in_float16_is_a_fault_where_it_is_not_declared(
    judged: Callable[..., Report],
) -> None:
    report = judged("linear-accumulates-float16", WIDE)
    assert report.verdict == "diverges"
    assert place(report) == "transformer.blocks.0.attn.Wqkv"


def test_accumulation_in_float16_conforms_where_it_is_declared(
    judged: Callable[..., Report],
) -> None:
    report = judged("linear-accumulates-float16", NARROW)
    assert (report.verdict, place(report)) == ("conforms", None)
    assert report.subject.rounding["accumulator"] == "float16"


def test_a_subject_better_than_declared_conforms(judged: Callable[..., Report]) -> None:
    assert judged(None, NARROW).verdict == "conforms"


@pytest.mark.parametrize("declared", [WIDE, NARROW], ids=["float32 sums", "float16 sums"])
def test_gelu_with_a_rounded_erf_is_a_fault_whatever_is_declared(
    declared: Rounding, judged: Callable[..., Report]
) -> None:
    report = judged("gelu-half-erf", declared)
    assert report.verdict == "diverges"
    assert place(report) == "transformer.blocks.0.ffn.act"


def test_gelu_that_is_rounded_once_conforms(judged: Callable[..., Report]) -> None:
    assert judged("same-gelu-half-first", WIDE).verdict == "conforms"


@pytest.fixture(scope="module")
def long_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose down projection has 16384 terms, as mpt-7b's has."""
    path = tmp_path_factory.mktemp("long") / "checkpoint"
    raw = {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 1, "expansion_ratio": 256}
    raw |= {"max_seq_len": 128, "vocab_size": 128, "no_bias": True, "attn_config": {"alibi": True}}
    make_checkpoint(path, raw, seed=3, dtype="float16")
    np.save(path.parent / "ids.npy", np.random.default_rng(1).integers(0, 128, 96))
    return path


@pytest.mark.parametrize(
    ("summed", "declared", "verdict"),
    [
        ("float32_cut", "float32", "diverges"),
        ("float32_cut", "float32_cut", "conforms"),
        ("float32", "float32_cut", "conforms"),
    ],
)
def test_long_sums_that_are_cut_conform_where_that_is_declared(
    summed: Any, declared: Any, verdict: str, long_sums: Path
) -> None:
    # Halves are no grouping that a limit is made of.
    halves = Order("halves", storage="float16", accumulator=summed, sum=Sum("split", 2))
    subject = OrderSubject(long_sums, "float16", halves, Rounding(accumulator=declared))
    prompts = str(long_sums.parent / "ids.npy")
    report = check(Request(long_sums, prompts=prompts, diagnose=False), given=subject)
    assert report.verdict == verdict
    wrong = {tap.tap for tap in report.taps if tap.verdict == "diverges"}
    assert wrong == ({"transformer.blocks.0.ffn.down_proj"} if verdict == "diverges" else set())
