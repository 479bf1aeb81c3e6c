"""What a fault is: a small mutation of the subject, made where the real mistake would be made."""

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

ENDS = ("transformer.wte", "transformer.wpe", "transformer.norm_f", "logits", "load")
"""Places outside the blocks: taps, and the loading of a subject."""
PATHS = "paths."
"""Before the names of the checks of paths with a cache."""


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
        Tap expected to diverge first, relative to its block; ``"alibi"`` for what the probe of the
        bias sees, ``"load"`` for a port that cannot even take the weights, ``"paths."`` and a check
        for what shows only with a cache.
    summary
        One sentence.
    operations
        Changes the building blocks of the Relax graph that is compiled and run.
    config
        Changes the parsed config before the graph is built.
    weights
        Changes the weight map; called with the map, the config and the layer (``None``: all).
    calls
        Changes the object whose methods a deployment calls: what is done around compiled functions.
    equivalent
        The mutation changes the code but not the model: it must not be flagged.
    proof
        Why, for an equivalent one.
    first_layer
        First block concerned where the fault is in all of them.
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
    calls: Callable[[Any], None] | None = None
    equivalent: bool = False
    proof: str = ""
    first_layer: int = 0

    @property
    def per_layer(self) -> bool:
        """Whether the fault can be confined to one layer."""
        outside = self.first_tap in ENDS or self.first_tap.startswith(PATHS)
        return self.config is None and not outside


@dataclass(frozen=True)
class Planted:
    """A fault in every layer, or in one."""

    fault: Fault
    layer: int | None = None

    @property
    def label(self) -> str:
        """Return ``NAME`` or ``NAME@LAYER``."""
        return self.fault.name if self.layer is None else f"{self.fault.name}@{self.layer}"

    @property
    def first_place(self) -> str:
        """Return the path of the tap expected to diverge first, empty for an equivalent one.

        The bias is probed through the attention of layer 0; in another layer alone it is the
        context that shows it.
        """
        tap = self.fault.first_tap
        layer = self.fault.first_layer if self.layer is None else self.layer
        if self.fault.equivalent:
            return ""
        if tap in ENDS or tap.startswith(PATHS) or (tap == "alibi" and layer == 0):
            return tap
        return f"transformer.blocks.{layer}.{'attn.context' if tap == 'alibi' else tap}"
