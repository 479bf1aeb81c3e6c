"""Weights of one layer at a time, for a model that is larger than the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

LAYER_PREFIX = "transformer.blocks."


class OneLayer(Mapping[str, Any]):
    """Tensors on the device, of one layer or of the two ends; those of another are let go first.

    Parameters
    ----------
    tensors
        Parameters by name, each made when it is asked for.
    load
        Brings one to the device.
    """

    def __init__(self, tensors: Mapping[str, Any], load: Callable[[Any], Any]) -> None:
        self._tensors = tensors
        self._load = load
        self._part = ""
        self._held: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return one tensor, loaded if its layer was not the last one asked for."""
        part = _part(name)
        if part != self._part:
            self._held.clear()
            self._part = part
        if name not in self._held:
            self._held[name] = self._load(self._tensors[name])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, loading nothing."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._tensors)


def _part(name: str) -> str:
    return (
        name.removeprefix(LAYER_PREFIX).split(".")[0] if name.startswith(LAYER_PREFIX) else "ends"
    )
