"""What a fault is: a small mutation of the subject, made where the real mistake would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Area = Literal[
    "alibi",
    "weights",
    "config",
    "mask",
    "norm",
    "activation",
    "residual",
    "precision",
    "decode",
    "tokens",
]


@dataclass(frozen=True)
class Fault:
    """A named mistake in a port of MPT.

    Attributes
    ----------
    name
        For the command line.
    area
        Part of the model that it concerns.
    evidence
        Where it was seen, or ``"invented"``.
    exposure
        Name of a checkpoint that shows it: ``"trained"`` or one of ``cases.exposure``.
    first_tap
        Tap expected to diverge first, relative to its block.
    summary
        One sentence.
    operations
        Changes the building blocks of the Relax graph that is compiled and run.
    config
        Changes the parsed config before the graph is built.
    weights
        Changes the weight map; called with the map, the config and the layer (``None``: all).
    per_layer
        Whether it can be confined to one layer.
    """

    name: str
    area: Area
    evidence: str
    exposure: str
    first_tap: str
    summary: str
    operations: Callable[[Any], Any] | None = None
    config: Callable[[Any], Any] | None = None
    weights: Callable[[Any, Any, int | None], Any] | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the fault can be confined to one layer."""
        return self.config is None and self.first_tap not in (
            "transformer.wte",
            "transformer.wpe",
            "transformer.norm_f",
            "logits",
        )


@dataclass(frozen=True)
class Planted:
    """A fault in every layer, or in one."""

    fault: Fault
    layer: int | None = None

    @property
    def label(self) -> str:
        """Return ``NAME`` or ``NAME@LAYER``."""
        return self.fault.name if self.layer is None else f"{self.fault.name}@{self.layer}"
