"""From a planted fault to a script that repeats it."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases.exposure import EXPOSURES
from harness.errors import BadInput
from harness.pipeline import Request
from harness.shrink.command import shrink
from harness.shrink.trial import Trial, fields_of, smaller, trial_of
from reference.config import MPTConfig


def least(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields at once at their smallest, as the reduction tries them first."""
    result = dict(fields)
    for name in fields:
        values = smaller(result, name)
        result[name] = values[0] if values else result[name]
    return result


@pytest.mark.parametrize("name", EXPOSURES)
def test_every_field_can_be_made_smaller_on_every_config(name: str) -> None:
    config = dict(EXPOSURES[name].config)
    fields = fields_of(config, 2, 64)
    base = Trial(config, {}, (), "relax", "gelu-tanh@1", "float16", "llvm")
    same = MPTConfig.from_dict(dict(trial_of(fields, base, 64).config))
    given = MPTConfig.from_dict(config)
    for field in ("d_model", "n_heads", "n_layers", "kv_n_heads", "hidden_dim", "vocab_size",
                  "qk_ln", "clip_qkv", "scale", "alibi", "no_bias", "logit_scale"):  # fmt: skip
        assert getattr(same, field) == getattr(given, field), field
    for field in fields:
        for value in smaller(fields, field):
            trial = trial_of(fields | {field: value}, base, 64)
            MPTConfig.from_dict(dict(trial.config))
    small = trial_of(least(fields), base, 64)
    parsed = MPTConfig.from_dict(dict(small.config))
    assert (parsed.n_layers, parsed.n_heads, parsed.head_dim) == (1, 2, 4)
    assert [len(row) for row in small.ids] == [4]
    assert max(small.ids[0]) < parsed.vocab_size
    assert small.fault == "gelu-tanh@0"


def test_a_planted_fault_shrinks_to_one_layer_and_its_script_fails_alike(
    tmp_path: Path, conform: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.cli import main

    script = tmp_path / "repro.py"
    words = ["mpt-conform", "shrink", "--fault", "out-proj-transposed", "-o", str(script)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    source = script.read_text()
    assert "'n_layers': 1" in source
    assert "'n_heads': 2" in source
    with pytest.raises(SystemExit) as repeated:
        runpy.run_path(str(script), run_name="__main__")
    assert repeated.value.code == 0
    # The script is about this fault: without it there is nothing to see.
    script.write_text(source.replace("fault='out-proj-transposed'", "fault=None"))
    with pytest.raises(SystemExit) as healthy:
        runpy.run_path(str(script), run_name="__main__")
    assert healthy.value.code == 1


def test_what_does_not_fail_cannot_be_made_small(checkpoint: Path, ids: Path) -> None:
    with pytest.raises(BadInput, match="does not diverge"):
        shrink(Request(checkpoint=checkpoint, prompts=str(ids), subject="torch"))
