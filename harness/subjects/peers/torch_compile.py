"""torch.compile of transformers' MPT, with inductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness.subjects.peers.graph import GraphSubject, Run
from harness.subjects.protocol import Rounding


def _build(module: Any, example: Any) -> Run:
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    return lambda given: compiled(given)


def load(checkpoint: Path, *, dtype: str, target: str) -> GraphSubject:
    """Make the subject; ``target`` is not used."""
    # What was compiled for the models before this one counts towards a limit.
    torch.compiler.reset()
    # Inductor computes in float32 between two buffers, and keeps the scores wide up to the softmax.
    rounding = Rounding()
    return GraphSubject(checkpoint, dtype, "torch-compile-cpu", _build, rounding)
