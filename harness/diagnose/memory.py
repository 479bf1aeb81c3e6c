"""Templates of the last few places: a campaign comes to the same ones again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from harness.diagnose.match import Template

MOST = 6
_memory: OrderedDict[str, tuple[Template, ...]] = OrderedDict()


def kept(checkpoint: str, key: str, make: Callable[[], Iterator[Template]]) -> tuple[Template, ...]:
    """Return templates from memory, or make them.

    Parameters
    ----------
    checkpoint
        Its digest; templates of a checkpoint without one are not remembered.
    key
        Digest of all that the templates hang on.
    make
        Makes them.
    """
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    templates = tuple(make())
    if checkpoint:
        _memory[key] = templates
        while len(_memory) > MOST:
            _memory.popitem(last=False)
    return templates
