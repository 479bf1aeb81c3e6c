"""The transformers library's MPT as a subject, on the configs it honours."""

from __future__ import annotations

from pathlib import Path

from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput
from harness.measure.oracle import stored
from harness.subjects.parts import DeployedTorchParts
from harness.subjects.protocol import Rounding


class TransformersSubject(DeployedTorchParts):
    """Wraps ``reference.hub.HubModel``; it evaluates in the original's order."""

    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from reference.hub import HubModel, NotHonoured

        opened = Checkpoint.open(checkpoint)
        read = stored(opened.read, dtype)
        try:
            model = HubModel(opened.config, read, storage=dtype)  # type: ignore[arg-type]
        except NotHonoured as error:
            raise BadInput(
                f"transformers cannot judge this config: {error}",
                where=str(checkpoint / "config.json"),
            ) from error
        super().__init__(
            model, "transformers-cpu", dtype, lambda: {name: read(name) for name in opened.names}
        )


def load(checkpoint: Path, *, dtype: str, target: str) -> TransformersSubject:
    """Make the subject; ``target`` is not used."""
    return TransformersSubject(checkpoint, dtype)
