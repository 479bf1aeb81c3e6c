"""OpenVINO's CPU plugin, on torch's ONNX export of transformers' MPT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness.subjects.peers.graph import GraphSubject, Run
from harness.subjects.peers.onnx_file import export
from harness.subjects.protocol import Rounding


def _build(module: Any, example: Any) -> Run:
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = export(module, example, Path(folder) / "model.onnx")
        # Otherwise a machine with bfloat16 units computes in bfloat16.
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", hint)

    def run(given: Any) -> list[Any]:
        results = compiled(given.numpy())
        return [results[index].copy() for index in range(len(compiled.outputs))]

    return run


def load(checkpoint: Path, *, dtype: str, target: str) -> GraphSubject:
    """Make the subject; ``target`` is not used."""
    return GraphSubject(checkpoint, dtype, "openvino-cpu", _build, Rounding())
