"""Subjects with a story: evaluation orders one after another, and an error that creeps."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from examples.own_mpt import OwnMPT
from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.parts import DeployedTorchParts
from harness.subjects.protocol import Rounding

CREEP = 1.1
"""The planted error grows by this factor from run to run."""
FIRST = 0.25
"""Its size where it begins, in parts of what rounding to storage does to the same element."""


class Creeping(OwnMPT):
    """An MPT whose projections round a little worse, and a little worse each time.

    Before it is rounded, every element is moved at random by a part of its own spacing: what an
    accumulator does that loses digits bit by bit. The same call moves in the same way each time.

    Parameters
    ----------
    age
        How many runs the error has had to grow; 0 for none.
    """

    def __init__(self, checkpoint: Path, dtype: str, age: int) -> None:
        super().__init__(checkpoint, dtype)
        self._part = FIRST * CREEP ** (age - 1) if age else 0.0

    def _linear(self, name: str, x: Any) -> Any:
        if not self._part:
            return super()._linear(name, x)
        wide = x.astype(np.float32) @ self._weights[name + ".weight"].T.astype(np.float32)
        spacing = np.abs(np.spacing(self._round(wide))).astype(np.float32)
        moved = np.random.default_rng(zlib.crc32(name.encode())).random(wide.shape) - 0.5
        return self._round(wide + np.float32(self._part) * spacing * moved.astype(np.float32))


class Ordered(DeployedTorchParts):
    """The reference in one of the legitimate orders, or one that no limit is made of."""

    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str, order: int) -> None:
        from reference.model import Reference

        opened = Checkpoint.open(checkpoint)
        read = stored(opened.read, dtype)
        chosen = orders(dtype)[order]
        model = Reference(opened.config, read, storage=dtype, order=chosen)  # type: ignore[arg-type]
        held = lambda: {name: read(name) for name in opened.names}  # noqa: E731
        super().__init__(model, f"torch {chosen.name}", dtype, held)


def orders(dtype: str) -> tuple[Any, ...]:
    """Return every order that rounds to storage as the original does."""
    from reference.orders import held_out_orders, legitimate_orders

    every = (*legitimate_orders(dtype), *held_out_orders(dtype))  # type: ignore[arg-type]
    return tuple(order for order in every if order.storage == dtype)
