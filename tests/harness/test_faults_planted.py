"""Faults planted through the command line: caught where they were planted, equivalents let pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cases.exposure import materialise
from harness.cli import app
from harness.errors import EXIT_CONFORMS, EXIT_DIVERGES, BadInput


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialise("clip", tmp_path_factory.mktemp("exposures"), "bfloat16")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "ids.npy"
    np.save(path, np.random.default_rng(5).integers(0, 211, (2, 48)))
    return path


def planted(fault: str, exposed: Path, prompts: Path, record: Path) -> tuple[int, dict[str, Any]]:
    words = ["check", str(exposed), "--prompts", str(prompts), "--fault", fault]
    result = CliRunner().invoke(app, [*words, "--json", str(record)], catch_exceptions=False)
    return result.exit_code, json.loads(record.read_text())


@pytest.mark.parametrize(
    ("fault", "tap"),
    [
        ("alibi-sign", "alibi"),
        ("clip-qkv-ignored", "transformer.blocks.0.attn.Wqkv"),
        ("norm-1-norm-2-swapped@1", "transformer.blocks.1.norm_1"),
        pytest.param("residual-parallel@1", "transformer.blocks.1.norm_2", marks=pytest.mark.long),
        ("linear-accumulates-float16", "transformer.blocks.0.attn.Wqkv"),
        ("ids-off-by-one", "transformer.wte"),
    ],
)
def test_a_fault_is_caught_where_it_was_planted(
    fault: str, tap: str, exposed: Path, prompts: Path, tmp_path: Path
) -> None:
    code, record = planted(fault, exposed, prompts, tmp_path / "record.json")
    assert code == EXIT_DIVERGES
    assert record["verdict"] == "diverges"
    assert record["subject"]["fault"] == fault
    assert record["first_divergence"]["tap"] == tap


@pytest.mark.parametrize("fault", ["same-clip-by-min-max", "same-residual-commuted@1"])
def test_an_equivalent_mutation_is_let_pass(
    fault: str, exposed: Path, prompts: Path, tmp_path: Path
) -> None:
    code, record = planted(fault, exposed, prompts, tmp_path / "record.json")
    assert (code, record["verdict"]) == (EXIT_CONFORMS, "conforms")
    assert record["first_divergence"] is None


def test_an_unknown_fault_is_bad_input(exposed: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown fault"):
        planted("alibi-sihn", exposed, prompts, tmp_path / "record.json")
