"""torch.export of transformers' MPT, decomposed to core ATen and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from harness.subjects.peers.graph import GraphSubject, Run
from harness.subjects.protocol import Rounding


def _build(module: Any, example: Any) -> Run:
    program = torch.export.export(module, (example,)).run_decompositions()
    return program.module()


def load(checkpoint: Path, *, dtype: str, target: str) -> GraphSubject:
    """Make the subject; ``target`` is not used."""
    return GraphSubject(checkpoint, dtype, "torch-export-cpu", _build, Rounding())
