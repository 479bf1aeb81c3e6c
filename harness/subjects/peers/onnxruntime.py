"""onnxruntime's CPU provider, on torch's export of transformers' MPT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness.subjects.peers.graph import GraphSubject, Run
from harness.subjects.peers.onnx_file import export
from harness.subjects.protocol import Rounding


def _build(module: Any, example: Any) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = export(module, example, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, {"given": given.numpy()})


def load(checkpoint: Path, *, dtype: str, target: str) -> GraphSubject:
    """Make the subject; ``target`` is not used."""
    return GraphSubject(checkpoint, dtype, "onnxruntime-cpu", _build, Rounding())
