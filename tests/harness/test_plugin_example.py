"""examples/own_mpt.py and the commands of docs/own-subject.md, as a reader runs them."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.subjects.protocol import STORAGE_DTYPES

Conform = Callable[..., Any]


def assert_complete(axes: Any) -> None:
    for name, axis in axes.items():
        assert axis["compared"] == axis["expected"] > 0, name
        assert not axis["skipped"], name


ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_mpt.py"
HOW_TO = ROOT / "docs" / "own-subject.md"


@pytest.fixture(autouse=True)
def beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_the_example_conforms(conform: Conform, checkpoint: Path, ids: Path, dtype: str) -> None:
    run = conform(
        *("check", checkpoint, "--prompts", ids, "--dtype", dtype),
        *("--subject", "examples.own_mpt:load"),
    )
    assert run.code == 0, run.out
    assert_complete(run.report["compared"])
    assert len(run.report["subject"]["offers"]) == 5


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_its_mistake_is_named(conform: Conform, checkpoint: Path, ids: Path, dtype: str) -> None:
    run = conform(
        *("check", checkpoint, "--prompts", ids, "--dtype", dtype),
        *("--subject", "examples.own_mpt:load_faulty"),
    )
    assert run.code == 1
    assert (run.first["tap"], run.first["layer"]) == ("alibi", 0)
    local = [tap["tap"] for tap in run.diverging if tap["mode"] == "local"]
    assert local == [f"transformer.blocks.{layer}.attn.context" for layer in (0, 1)]


@pytest.mark.parametrize(
    "attention",
    [
        {"attn_type": "multiquery_attention", "clip_qkv": 0.7},
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "softmax_scale": 0.5},
    ],
)
def test_the_example_knows_shared_heads_and_biases(
    conform: Conform,
    config_of: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ids: Path,
    attention: dict[str, Any],
) -> None:
    from cases.synthetic import make_checkpoint

    raw = config_of(no_bias=False, attn=attention | {"alibi_bias_max": 16})
    made = make_checkpoint(tmp_path / "made", raw, seed=1, dtype="float16", fmt="safetensors")
    run = conform("check", made, "--prompts", ids, "--subject", "examples.own_mpt:load")
    assert run.code == 0, run.out


def test_the_example_says_what_it_cannot_do(
    conform: Conform, config_of: Callable[..., dict[str, Any]], tmp_path: Path, ids: Path
) -> None:
    from cases.synthetic import make_checkpoint

    made = make_checkpoint(
        tmp_path / "made", config_of(attn={"qk_ln": True}), seed=1, dtype="float16"
    )
    run = conform("check", made, "--prompts", ids, "--subject", "examples.own_mpt:load")
    assert run.code == 1
    assert "NotImplementedError: only ALiBi without qk_ln" in run.first["reason"]


def test_the_example_stands_on_the_public_protocol_alone() -> None:
    modules = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    ours = {
        name
        for name in modules
        if name and name.split(".")[0] in ("cases", "harness", "reference", "relax_impl")
    }
    assert ours == {"harness.subjects.protocol"}
    assert "environ" not in EXAMPLE.read_text()


def commands() -> list[list[str]]:
    lines = re.findall(r"^\$ (.*)$", HOW_TO.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_every_command_of_the_how_to_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = []
    for words in commands():
        assert words[0] == "mpt-conform"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        codes.append((words[1], stopped.value.code, "load_faulty" in " ".join(words)))
    assert codes == [
        ("check", 0, False),
        ("check", 1, True),
        ("trace", 0, False),
        ("check", 0, False),
    ], capsys.readouterr()
    assert "alibi" in (tmp_path / "faulty.json").read_text()


def test_every_tap_and_field_of_the_how_to_exists() -> None:
    from dataclasses import fields

    from harness.measure.taps import block_widths
    from harness.subjects.protocol import OPTIONAL_METHODS, Rounding
    from reference.config import MPTConfig

    text = HOW_TO.read_text()
    config = MPTConfig.from_dict({"attn_config": {"qk_ln": True, "alibi": True}})
    for name in (*block_widths(config), *OPTIONAL_METHODS, *(f.name for f in fields(Rounding))):
        assert f"`{name}`" in text or f"`{name}(" in text, name
