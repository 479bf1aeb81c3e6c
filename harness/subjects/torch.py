"""The reference as a subject: the original's order of evaluation in the storage dtype."""

from __future__ import annotations

from pathlib import Path

from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.parts import DeployedTorchParts
from harness.subjects.protocol import Rounding


class TorchSubject(DeployedTorchParts):
    """Wraps ``reference.model.Reference`` in the original's order."""

    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from reference.model import Reference

        opened = Checkpoint.open(checkpoint)
        read = stored(opened.read, dtype)
        model = Reference(opened.config, read, storage=dtype)  # type: ignore[arg-type]
        super().__init__(
            model, "torch-cpu", dtype, lambda: {name: read(name) for name in opened.names}
        )


def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
    """Make the subject; ``target`` is not used."""
    return TorchSubject(checkpoint, dtype)
