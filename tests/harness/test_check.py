"""``mpt-conform check`` from a checkpoint to a verdict, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.measure.paths import CHECKS
from harness.measure.relations import RELATIONS
from harness.measure.taps import block_widths, places
from harness.subjects.protocol import OPTIONAL_METHODS, PATH_METHODS, STORAGE_DTYPES
from reference.config import MPTConfig

Conform = Callable[..., Any]
AXES = {"tensors", "layers", "taps", "paths", "cases", "positions", "dtypes", "targets"}
FIELDS = {
    "schema",
    "verdict",
    "reason",
    "subject",
    "checkpoint",
    "compared",
    "first_divergence",
    "taps",
    "tensors",
    "logits",
    "failures",
    "conversion",
    "environment",
    "seconds",
    "reproduce",
}


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("subject", ["relax", "torch", "transformers"])
def test_every_implementation_conforms_in_every_precision(
    conform: Conform,
    checkpoint: Path,
    ids: Path,
    config_of: Callable[..., dict[str, Any]],
    subject: str,
    dtype: str,
) -> None:
    run = conform("check", checkpoint, "--subject", subject, "--dtype", dtype, "--prompts", ids)
    assert run.code == 0, run.out + run.err
    report = run.report
    assert report["verdict"] == "conforms"
    assert report["first_divergence"] is None
    assert run.out.startswith(f"conforms: {report['subject']['name']} {dtype}")

    # Only one of them keeps a cache; what the others lack is said, and not expected.
    caches = subject == "relax"
    assert set(report["compared"]) == (AXES if caches else AXES - {"paths"})
    assert set(report["subject"]["lacks"]) == (set() if caches else set(PATH_METHODS))
    for name, axis in report["compared"].items():
        assert axis["compared"] == axis["expected"] > 0, name
        assert not axis["skipped"], name
    # Expected is what the config says, counted here by other means.
    assert report["compared"]["tensors"]["expected"] == 1 + 6 * 2 + 1
    assert report["compared"]["layers"]["expected"] == 2
    assert report["compared"]["positions"]["expected"] == 2 * 19 + 2 * 19
    assert report["compared"]["taps"]["expected"] == 2 + 2 * 10 + 2

    config = MPTConfig.from_dict(config_of())
    inside = {place.path for place in places(config) if place.layer is not None}
    seen: dict[str, set[str]] = {}
    for tap in report["taps"]:
        assert tap["verdict"] == "conforms"
        assert 0 <= tap["ratio"] <= 1
        seen.setdefault(tap["mode"], set()).add(tap["tap"])
    ends = {"transformer.norm_f", "logits"}
    every = {f"paths.{one.name}" for one in (*CHECKS, *RELATIONS)}
    paths = every if subject == "relax" else set()
    assert seen == {
        "alibi": {"alibi"},
        "local": inside | ends,
        "teacher-forced": inside,
        "free-running": inside | ends | {"transformer.wte"},
        "deployed": {"logits", "forward-chain"} | paths,
    }
    assert len(inside) == 2 * len(block_widths(config))


def test_the_record_says_what_a_verdict_depends_on(
    conform: Conform, checkpoint: Path, ids: Path
) -> None:
    report = conform("check", checkpoint, "--subject", "torch", "--prompts", ids).report
    assert set(report) >= FIELDS
    assert report["schema"] == 1
    assert report["subject"] == {
        "name": "torch-cpu",
        "dtype": "float16",
        "target": "llvm",
        "fault": None,
        "rounding": {
            "scores": "storage",
            "probabilities": "storage",
            "residual": "storage",
            "activation": "storage",
            "accumulator": "float32",
        },
        "offers": sorted(OPTIONAL_METHODS),
        "lacks": sorted(PATH_METHODS),
    }
    assert report["checkpoint"]["path"] == str(checkpoint)
    assert len(report["checkpoint"]["digest"]) == 64
    assert report["checkpoint"]["config"]["n_heads"] == 6
    assert {"python", "machine", "cpu", "apache-tvm", "torch", "numpy", "threads"} <= set(
        report["environment"]
    )
    assert report["conversion"]["source"] == "bfloat16"
    assert report["conversion"]["target"] == "float16"
    assert report["failures"] == []
    assert all(tensor["arrived"] for tensor in report["tensors"])
    assert len(report["tensors"]) == 14
    # Two rows of one file are two cases, and a batch of both.
    assert [row["positions"] for row in report["logits"]] == [19, 19, 38]
    assert report["seconds"] > 0


def test_the_command_in_the_record_repeats_the_check(
    conform: Conform, checkpoint: Path, ids: Path
) -> None:
    first = conform(
        *("check", checkpoint, "--subject", "torch", "--dtype", "bfloat16", "--prompts", ids),
        *("--max-tokens", 5, "--layers", "1"),
    )
    words = first.report["reproduce"].split()
    assert words[0] == "mpt-conform"
    again = conform(*words[1:])
    assert again.code == first.code == 0
    for record in (first.report, again.report):
        record.pop("seconds")
    assert again.report == first.report


def test_slopes_of_inverse_squares_are_named(conform: Conform, checkpoint: Path, ids: Path) -> None:
    run = conform("check", checkpoint, "--fault", "alibi-inverse-square", "--prompts", ids)
    assert run.code == 1
    assert run.report["verdict"] == "diverges"
    assert run.report["subject"]["fault"] == "alibi-inverse-square"
    first = run.first
    assert (first["tap"], first["layer"], first["mode"]) == ("alibi", 0, "alibi")
    assert first["observed"] > first["limit"] > 0
    assert first["head"] in range(6)
    local = [tap["tap"] for tap in run.diverging if tap["mode"] == "local"]
    assert local == [f"transformer.blocks.{i}.attn.context" for i in (0, 1)]
    assert "first divergence: alibi" in run.out
    # Coverage is what it would have been: a divergence is not an excuse.
    assert all(a["compared"] == a["expected"] for a in run.report["compared"].values())


@pytest.mark.parametrize("layer", [0, 1])
def test_a_fault_in_one_layer_is_found_in_that_layer(
    conform: Conform, checkpoint: Path, ids: Path, layer: int
) -> None:
    run = conform("check", checkpoint, "--fault", f"alibi-inverse-square@{layer}", "--prompts", ids)
    assert run.code == 1
    assert run.report["subject"]["fault"] == f"alibi-inverse-square@{layer}"
    local = [(tap["tap"], tap["layer"]) for tap in run.diverging if tap["mode"] == "local"]
    assert local == [(f"transformer.blocks.{layer}.attn.context", layer)]
    forced = {tap["layer"] for tap in run.diverging if tap["mode"] == "teacher-forced"}
    assert forced == {layer}
    assert run.first["layer"] == layer
    if layer > 0:
        # The bias is measured in layer 0, which is healthy.
        assert run.first["tap"] == f"transformer.blocks.{layer}.attn.context"
        assert run.first["token"] in range(19)
        assert run.first["head"] in range(6)


def test_layers_that_are_left_out_are_stated(conform: Conform, checkpoint: Path, ids: Path) -> None:
    run = conform("check", checkpoint, "--subject", "torch", "--layers", "1", "--prompts", ids)
    assert run.code == 0
    layers = run.report["compared"]["layers"]
    assert (layers["expected"], layers["compared"]) == (2, 1)
    assert layers["skipped"] == [{"count": 1, "reason": "--layers leaves it out"}]
    taps = run.report["compared"]["taps"]
    assert taps["skipped"] == [{"count": 10, "reason": "--layers leaves it out"}]
    assert taps["compared"] + 10 == taps["expected"]
    assert {tap["layer"] for tap in run.report["taps"]} == {None, 1}


def test_a_fault_outside_the_chosen_layers_still_shows_at_the_end(
    conform: Conform, checkpoint: Path, ids: Path
) -> None:
    run = conform(
        *("check", checkpoint, "--fault", "alibi-inverse-square@1"),
        *("--layers", "0", "--prompts", ids),
    )
    assert run.code == 1
    assert run.first["tap"] in ("transformer.norm_f", "logits")


def test_the_shipped_checkpoint_and_prompts_are_the_default(conform: Conform) -> None:
    run = conform("check", "--subject", "torch", "--max-tokens", 24, "--layers", "0")
    assert run.code == 0, run.out
    assert run.report["reproduce"].startswith("mpt-conform check --subject torch")
    assert len(run.report["logits"]) > 5
    assert run.report["compared"]["tensors"]["compared"] > 0


def test_the_process_ends_with_the_verdicts_code(tmp_path: Path, checkpoint: Path) -> None:
    """A release gate sees this number and nothing else."""
    program = "from harness.cli import main; main()"
    root = Path(__file__).resolve().parents[2]
    prompt = tmp_path / "one.json"
    prompt.write_text(json.dumps([1, 2, 3, 4, 5]))
    command = [sys.executable, "-c", program, "check", str(checkpoint), "--prompts", str(prompt)]

    def code(*more: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(
            [*command, *more], env=environment, cwd=tmp_path, capture_output=True
        ).returncode

    assert code() == 0
    assert code("--fault", "alibi-inverse-square") == 1
    assert code("--layers", "7") == 2
    assert code("--no-such-option") == 2
