"""How much longer a walk will take, known once its first layer is behind it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Tells, layer by layer, how much longer a walk will take.

    Parameters
    ----------
    layers
        Number of layers in all.
    tell
        Called with the text of a step.
    now
        Seconds on a clock that never goes back.
    """

    def __init__(
        self,
        layers: int,
        tell: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers, self._tell, self._now = layers, tell, now
        self._started: float | None = None

    def layer(self, layer: int) -> None:
        """Say that ``layer`` begins, and from the second on how long the rest will take."""
        text = f"layer {layer + 1} of {self._layers}"
        if self._started is None:
            self._started = self._now()
        elif layer > 0:
            # The head does about as much as a layer.
            left = (self._now() - self._started) / layer * (self._layers - layer + 1)
            text += f", about {spoken(left)} left"
        self._tell(text)


def spoken(seconds: float) -> str:
    """Return a duration as people say it: ``8 s``, ``3 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
