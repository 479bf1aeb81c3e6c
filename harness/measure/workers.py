"""Independent evaluations side by side: torch and numpy let go of the interpreter while they work.

Each evaluation keeps to one thread of its own, so that the golden and its orders share the cores
instead of splitting every small product among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORTH = 1 << 14
"""Elements below which handing work over costs more than it saves."""


def each(
    function: Callable[[Item], Result], items: Iterable[Item], size: int
) -> tuple[Result, ...]:
    """Return ``function`` of every item, in order; side by side where that is worth it.

    Parameters
    ----------
    function
        Evaluates one item; must not call `each` itself.
    size
        Elements that one evaluation works on.
    """
    import torch

    threads = torch.get_num_threads()
    if threads < 2 or size < WORTH:
        return tuple(map(function, items))
    return tuple(_pool(threads).map(function, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    import torch

    # The number of threads of torch is one of the calling thread's own.
    return ThreadPoolExecutor(threads, "evaluation", torch.set_num_threads, (1,))
