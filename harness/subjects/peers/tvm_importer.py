"""TVM's importer of exported programs, on transformers' MPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.subjects.peers.graph import GraphSubject, Run
from harness.subjects.protocol import Rounding


def _build(module: Any, example: Any) -> Run:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    program = torch.export.export(module, (example,))
    imported = from_exported_program(program, keep_params_as_input=False)
    # The same pipeline and the same TIR as the diagnosis compiles with.
    target = tvm.target.Target("llvm")
    with target:
        built = tvm.compile(
            imported,
            target=target,
            relax_pipeline=relax.pipeline.get_default_pipeline(target),
            tir_pipeline="s_tir",
        )
    machine = relax.VirtualMachine(built, tvm.cpu())

    def run(given: Any) -> list[Any]:
        results = machine["main"](tvm.runtime.tensor(_numpy(given)))
        return [np.asarray(result.numpy()) for result in results]

    return run


def _numpy(tensor: Any) -> Any:
    import ml_dtypes

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load(checkpoint: Path, *, dtype: str, target: str) -> GraphSubject:
    """Make the subject; ``target`` is not used."""
    return GraphSubject(checkpoint, dtype, "tvm-importer-llvm", _build, Rounding())
