"""The reference as a subject: the original's order of evaluation in the storage dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.parts import DeployedTorchParts
from harness.subjects.protocol import Array, Rounding


class TorchSubject(DeployedTorchParts):
    """Wraps ``reference.model.Reference`` in the original's order."""

    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str, *, stream: bool = False) -> None:
        from reference.model import Reference

        opened = Checkpoint.open(checkpoint)
        read = stored(opened.read, dtype)
        storage: Any = dtype
        model = Reference(opened.config, read, storage=storage, keep=not stream)
        super().__init__(model, "torch-cpu", dtype, lambda: _Weights(opened.names, read))


class _Weights(Mapping[str, Array]):
    """The tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, names: tuple[str, ...], read: Callable[[str], Array]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(checkpoint: Path, *, dtype: str, target: str, stream: bool = False) -> TorchSubject:
    """Make the subject, with one part's weights at a time if streamed; `target` is not used."""
    return TorchSubject(checkpoint, dtype, stream=stream)
