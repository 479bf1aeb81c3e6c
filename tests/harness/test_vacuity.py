"""A pass that proves nothing must not be a pass: each way to get one, through the command line.

Exit code 3 is "not proven", 2 is "cannot be used", 1 is "diverges"; none of these may be 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cases.hub_layout import write_checkpoint
from cases.synthetic import random_tensor
from cases.topology import tensor_shapes
from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.protocol import Rounding
from harness.subjects.torch import load as load_torch
from reference.orders import GOLDEN

Conform = Callable[..., Any]
Made = Callable[[Callable[..., Any]], str]
Array = np.ndarray


@dataclass
class Golden:
    """The oracle's own float64 result, sold as an implementation."""

    checkpoint: Path
    dtype: str
    name: str = "golden"
    rounding: Rounding = Rounding()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        from reference.model import Reference

        self._opened = Checkpoint.open(self.checkpoint)
        read = stored(self._opened.read, self.dtype)
        self._read = read
        self._model = Reference(self._opened.config, read, storage=self.dtype, order=GOLDEN)  # type: ignore[arg-type]

    def _numpy(self, taps: Any) -> Any:
        return {name: tensor.numpy() for name, tensor in taps.items()}

    def _tensor(self, array: Array) -> Any:
        import torch

        return torch.from_numpy(np.asarray(array).astype(np.float64))

    def forward(self, input_ids: Array, lengths: Any = None) -> Array:
        return self._model.forward(input_ids).numpy()

    def embed(self, input_ids: Array) -> Any:
        return self._numpy(self._model.embed(input_ids))

    def block(self, layer: int, hidden: Array) -> Any:
        return self._numpy(self._model.block(layer, self._tensor(hidden)))

    def head(self, hidden: Array) -> Any:
        return self._numpy(self._model.head(self._tensor(hidden)))

    def parameters(self) -> Any:
        return {name: self._read(name) for name in self._opened.names}


def test_the_golden_itself_is_not_proven(
    conform: Conform, made: Made, checkpoint: Path, ids: Path
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Golden:
        return Golden(checkpoint, dtype)

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 3, run.out
    assert run.report["verdict"] == "not-proven"
    assert "golden itself" in run.report["reason"]
    assert "golden itself" in run.out


def test_the_golden_behind_forward_alone_is_not_proven(
    conform: Conform, made: Made, checkpoint: Path, ids: Path
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        golden = Golden(checkpoint, dtype)
        return SimpleNamespace(name="golden", dtype=dtype, forward=golden.forward)

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 3
    assert "golden itself" in run.report["reason"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constants_diverge_everywhere(
    conform: Conform, made: Made, checkpoint: Path, ids: Path, value: float
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        healthy = load_torch(checkpoint, dtype=dtype, target=target)

        def constant(method: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                result = getattr(healthy, method)(*arguments)
                if not isinstance(result, dict):
                    return np.full_like(result, value)
                return {name: np.full_like(array, value) for name, array in result.items()}

            return call

        methods = ("forward", "embed", "block", "head", "attention_bias")
        return SimpleNamespace(name="constant", dtype=dtype, **{m: constant(m) for m in methods})

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["tap"] == "transformer.wte"
    kept = {(tap["tap"], tap["mode"]) for tap in run.report["taps"]} - {
        (tap["tap"], tap["mode"]) for tap in run.diverging
    }
    # Zeros agree with what is computed from zeros, and a forward of zeros with a chain of zeros.
    assert all(
        mode == "local" or (tap, mode) == ("forward-chain", "deployed") for tap, mode in kept
    )


def test_a_subject_that_repeats_its_first_answer_diverges(
    conform: Conform, made: Made, checkpoint: Path, ids: Path
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        healthy = load_torch(checkpoint, dtype=dtype, target=target)
        kept: dict[tuple[int, ...], Array] = {}

        def forward(input_ids: Array, lengths: Any = None) -> Array:
            return kept.setdefault(input_ids.shape, healthy.forward(input_ids))

        return SimpleNamespace(name="stale", dtype=dtype, forward=forward)

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["case"] == "ids.1"


def forward_only(checkpoint: Path, *, dtype: str, target: str) -> Any:
    healthy = load_torch(checkpoint, dtype=dtype, target=target)
    return SimpleNamespace(
        name="bare", dtype=dtype, rounding=healthy.rounding, forward=healthy.forward
    )


def test_without_optional_methods_the_logits_are_judged_and_the_verdict_says_so(
    conform: Conform, made: Made, checkpoint: Path, ids: Path
) -> None:
    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(forward_only))
    assert run.code == 0, run.out
    report = run.report
    assert report["subject"]["offers"] == []
    assert [(tap["tap"], tap["mode"]) for tap in report["taps"]] == [("logits", "deployed")]
    compared = report["compared"]
    reasons = {axis: [s["reason"] for s in compared[axis]["skipped"]] for axis in compared}
    assert reasons["tensors"] == ["the subject has no parameters()"]
    assert reasons["layers"] == ["the subject has no block()"]
    assert set(reasons["taps"]) == {
        f"the subject has no {method}()" for method in ("embed", "attention_bias", "block", "head")
    }
    for axis in compared.values():
        skipped = sum(item["count"] for item in axis["skipped"])
        assert axis["compared"] + skipped == axis["expected"] > 0
    assert compared["taps"]["compared"] == 1
    assert compared["layers"]["compared"] == 0
    assert "the subject has no block()" in run.out


def test_without_optional_methods_wrong_logits_still_diverge(
    conform: Conform, made: Made, checkpoint: Path, ids: Path
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        subject = forward_only(checkpoint, dtype=dtype, target=target)
        healthy = subject.forward
        subject.forward = lambda ids, lengths=None: healthy(np.roll(ids, 1, axis=1))
        return subject

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["tap"] == "logits"


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, np.asarray(content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(content)
    return path


PROMPTS: dict[str, tuple[str, Any, str]] = {
    "no token": ("p.json", [], "token"),
    "no row": ("p.npy", np.zeros((0, 4), np.int64), "token"),
    "empty rows": ("p.npy", np.zeros((2, 0), np.int64), "token"),
    "an empty text": ("p.txt", "", "character"),
    "text without a tokenizer": ("p.txt", "hello", "tokenizer"),
    "fractions": ("p.npy", np.ones((1, 3)), "integers"),
    "an id beyond the vocabulary": ("p.json", [1, 97], "0..96"),
    "a negative id": ("p.json", [1, -1], "-1"),
    "a sequence beyond max_seq_len": ("p.npy", np.ones((1, 65), np.int64), "64"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_hide_everything_are_refused(
    conform: Conform, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    name, content, words = PROMPTS[case]
    file = write(tmp_path / name, content)
    run = conform("check", checkpoint, "--subject", "torch", "--prompts", file)
    assert run.code == 2, run.out
    assert run.record is None
    assert words in run.err


def test_a_folder_without_prompts_is_refused(
    conform: Conform, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.md").write_text("none here")
    run = conform("check", checkpoint, "--subject", "torch", "--prompts", tmp_path)
    assert run.code == 2


@pytest.mark.parametrize("layers", ["", "2", "1,7", "-1", "1-0", "0-9", "x", "0,"])
def test_layers_that_select_nothing_or_too_much_are_refused(
    conform: Conform, checkpoint: Path, ids: Path, layers: str
) -> None:
    run = conform("check", checkpoint, "--subject", "torch", "--prompts", ids, f"--layers={layers}")
    assert run.code == 2, run.out
    assert "--layers" in run.err


def test_no_token_left_is_refused(conform: Conform, checkpoint: Path, ids: Path) -> None:
    run = conform("check", checkpoint, "--subject", "torch", "--prompts", ids, "--max-tokens", "0")
    assert run.code == 2


@pytest.mark.parametrize("name", ["alibi", "no-such-fault", "", "alibi-absent@2", "alibi-absent@"])
def test_a_fault_that_is_not_there_is_refused(
    conform: Conform, checkpoint: Path, ids: Path, name: str
) -> None:
    """Planted nowhere it would "survive" every check."""
    run = conform("check", checkpoint, "--prompts", ids, f"--fault={name}")
    assert run.code == 2, run.out
    assert "--fault" in run.err


def test_a_device_that_is_missing_is_not_proven(
    conform: Conform, checkpoint: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is one: what counts is that none is found."""
    import relax_impl.compile as compiling

    monkeypatch.setattr(compiling.tvm, "cuda", lambda index: SimpleNamespace(exist=False))
    run = conform("check", checkpoint, "--prompts", ids, "--target", "cuda")
    assert run.code == 3
    assert run.record is None
    assert "no cuda device" in run.err
    assert "nothing was compared" in run.err


def rewritten(
    target: Path,
    raw: dict[str, Any],
    change: Callable[[str, Array], Array],
    dtype: str = "bfloat16",
) -> Path:
    shapes = tensor_shapes(raw)
    return write_checkpoint(
        target,
        raw,
        shapes,
        lambda name: change(name, random_tensor(name, shapes[name], 0)),
        dtype=dtype,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(
    conform: Conform,
    config_of: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ids: Path,
    bad: float,
) -> None:
    """NaN on both sides would agree with itself."""

    def change(name: str, array: Array) -> Array:
        if name == "transformer.blocks.1.norm_2.weight":
            array[5] = bad
        return array

    broken = rewritten(tmp_path / "broken", config_of(), change)
    run = conform("check", broken, "--subject", "torch", "--prompts", ids)
    assert run.code == 2
    assert "transformer.blocks.1.norm_2.weight" in run.err
    assert "[5]" in run.err


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.norm_f.weight"])
def test_weights_of_zero_prove_nothing(
    conform: Conform,
    config_of: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ids: Path,
    name: str,
) -> None:
    """Whatever a port does, zero logits come out."""
    flat = rewritten(tmp_path / "flat", config_of(), lambda n, a: a * (n != name))
    run = conform("check", flat, "--subject", "torch", "--prompts", ids)
    assert run.code == 3, run.out
    assert run.report["compared"]["taps"]["compared"] < run.report["compared"]["taps"]["expected"]


@pytest.mark.parametrize("where", [0, 1])
def test_a_layer_whose_attention_says_nothing_is_not_proven(
    conform: Conform,
    config_of: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ids: Path,
    where: int,
) -> None:
    name = f"transformer.blocks.{where}.attn.Wqkv.weight"
    flat = rewritten(tmp_path / "flat", config_of(), lambda n, a: a * (n != name))
    run = conform("check", flat, "--subject", "torch", "--prompts", ids)
    assert run.code == 3
    assert run.report["compared"]["layers"]["compared"] == 1


def test_a_stream_that_overflows_the_precision_diverges(
    conform: Conform, config_of: Callable[..., dict[str, Any]], tmp_path: Path, ids: Path
) -> None:
    """The golden is fine, float16 cannot hold it: infinity on both sides is no agreement."""

    def change(name: str, array: Array) -> Array:
        return array * (1e6 if name.endswith("down_proj.weight") else 1)

    wide = rewritten(tmp_path / "wide", config_of(), change, "float32")
    run = conform("check", wide, "--subject", "torch", "--prompts", ids)
    assert run.code != 0
    bfloat16 = conform("check", wide, "--subject", "torch", "--prompts", ids, "--dtype", "bfloat16")
    assert bfloat16.code == 0, bfloat16.out


def test_a_checkpoint_without_tensors_is_refused(
    conform: Conform, checkpoint: Path, tmp_path: Path, ids: Path
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    run = conform("check", tmp_path, "--subject", "torch", "--prompts", ids)
    assert run.code == 2


def test_a_model_without_layers_is_refused(
    conform: Conform, checkpoint: Path, with_config: Callable[..., Path], tmp_path: Path, ids: Path
) -> None:
    empty = with_config(checkpoint, tmp_path / "empty", lambda raw: raw.update(n_layers=0))
    run = conform("check", empty, "--subject", "torch", "--prompts", ids)
    assert run.code == 2
    assert "n_layers" in run.err


def test_tensors_beyond_the_config_are_not_left_lying(
    conform: Conform, checkpoint: Path, with_config: Callable[..., Path], tmp_path: Path, ids: Path
) -> None:
    """A config of one layer for two layers' weights: half of the model would go unjudged."""
    half = with_config(checkpoint, tmp_path / "half", lambda raw: raw.update(n_layers=1))
    run = conform("check", half, "--subject", "torch", "--prompts", ids)
    assert run.code == 2
    assert "unexpected" in run.err


@pytest.mark.parametrize("command", ["check", "compare"])
def test_an_empty_dump_is_refused(
    conform: Conform, checkpoint: Path, tmp_path: Path, command: str
) -> None:
    from safetensors.numpy import save_file

    dump = tmp_path / "empty.safetensors"
    save_file({}, dump)
    arguments = (
        ("check", checkpoint, "--traces", dump) if command == "check" else ("compare", dump, dump)
    )
    run = conform(*arguments)
    assert run.code == 2, run.out
    assert "empty.safetensors" in run.err


def test_a_dump_of_empty_arrays_is_refused(
    conform: Conform, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    dump = tmp_path / "hollow.safetensors"
    save_file(
        {
            "input_ids": np.zeros((1, 0), np.int32),
            "logits": np.zeros((1, 0, 97), np.float16),
        },
        dump,
        metadata={"dtype": "float16"},
    )
    run = conform("check", checkpoint, "--traces", dump)
    assert run.code == 2, run.out
    assert "hollow.safetensors" in run.err or "empty" in run.err


def test_a_dump_without_taps_is_not_proven(
    conform: Conform, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    dump = tmp_path / "ids.safetensors"
    save_file({"input_ids": np.ones((1, 4), np.int32)}, dump, metadata={"dtype": "float16"})
    run = conform("check", checkpoint, "--traces", dump)
    assert run.code in (2, 3), run.out


def test_prompts_of_one_token_hide_the_attention_and_the_default_ones_do_not(
    checkpoint: Path, config_of: Callable[..., dict[str, Any]]
) -> None:
    from harness.inputs import load_cases
    from reference.config import MPTConfig

    cases = load_cases(None, MPTConfig.from_dict(config_of()), checkpoint, max_tokens=None)
    lengths = {case.ids.shape[1] for case in cases}
    assert {1, 2, 64} <= lengths
    assert any(case.ids.shape[0] > 1 for case in cases)
    assert max(int(case.ids.max()) for case in cases) == 96
    assert min(int(case.ids.min()) for case in cases) == 0
