"""A subject that shows its logits alone: a config that it misreads is named all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.exposure import materialise
from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.pipeline import Request, check
from reference.model import Reference


class LogitsAlone:
    """The reference with another config than the checkpoint's."""

    protocol, name, dtype = 1, "logits-alone", "float32"

    def __init__(self, path: Path, attention: dict[str, Any]) -> None:
        opened = Checkpoint.open(path)
        raw = {**opened.config, "attn_config": {**opened.config["attn_config"], **attention}}
        self._model = Reference(raw, stored(opened.read, "float32"), storage="float32")

    def forward(self, input_ids: Any, lengths: Any = None) -> Any:
        return self._model.forward(input_ids).numpy()


def judged(path: Path, prompts: Path, attention: dict[str, Any]) -> Any:
    np.save(prompts / "ids.npy", np.random.default_rng(1).integers(0, 200, (1, 40), np.int32))
    request = Request(checkpoint=path, dtype="float32", prompts=str(prompts))
    return check(request, given=LogitsAlone(path, attention))


@pytest.mark.parametrize(
    ("exposure", "attention", "fault"),
    [
        ("clip", {"clip_qkv": None}, "clip-qkv-ignored"),
        ("bias-max-16-heads-12", {"alibi_bias_max": 8}, "alibi-bias-max-ignored"),
        ("wpe", {"alibi": True}, "alibi-always-on"),
    ],
)
def test_misread_field_is_named(exposure: str, attention: Any, fault: str, tmp_path: Path) -> None:
    path = materialise(exposure, tmp_path / "cache", "float32")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    report = judged(path, prompts, attention)
    assert report.verdict == "diverges"
    assert report.diagnosis.fault == fault


def test_another_fault_is_none_of_these(tmp_path: Path) -> None:
    path = materialise("clip", tmp_path / "cache", "float32")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    # Another number than any fault of the library takes.
    report = judged(path, prompts, {"clip_qkv": 1.1})
    assert report.verdict == "diverges"
    assert report.diagnosis.fault is None
