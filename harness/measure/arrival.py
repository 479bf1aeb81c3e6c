"""Did every tensor arrive? The parameters of a subject against the checkpoint, by content.

Under its own name a tensor is proved element by element: orientation and order are part of it. The
name of a parameter that is not a tensor's says nothing, and a subject may store what it holds as
its kernels like it. There the content is looked for: as it is, then transposed, then in any order.
The last proves that nothing was lost, doubled or exchanged with another tensor, and not that the
elements stand in the right places; the record says so, and the taps have to judge it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.subjects.protocol import Array


@dataclass(frozen=True)
class Arrival:
    """What became of one tensor.

    Attributes
    ----------
    tensor
        Name in the checkpoint.
    arrived
        Whether its content was found.
    detail
        Where it was found and how, or what stands in its place.
    in_order
        Whether every element is proved to be in its place, if only transposed.
    """

    tensor: str
    arrived: bool
    detail: str
    in_order: bool = True


def _digest(array: Array, *parts: object) -> str:
    digest = hashlib.sha256(repr((str(array.dtype), *parts)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _as_it_is(array: Array) -> str:
    return _digest(array, array.shape)


def _transposed(array: Array) -> str:
    return _digest(array.T, array.T.shape) if array.ndim == 2 else ""


def _any_order(array: Array) -> str:
    """Return a digest of the nonzero elements: packed layouts permute, and pad with zeros."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    return _digest(np.sort(bits[flat != 0]), str(flat.dtype))


_WAYS: tuple[tuple[Callable[[Array], str], str, bool], ...] = (
    (_as_it_is, "as {}", True),
    (_transposed, "as {}, transposed", True),
    (_any_order, "as {}, in another order: its places are not proved", False),
)
"""How a tensor is looked for among unnamed parameters, the strongest proof first."""


def prove_arrival(
    names: Iterable[str], read: Callable[[str], Array], parameters: Mapping[str, Array]
) -> tuple[Arrival, ...]:
    """Look for every checkpoint tensor among a subject's parameters.

    A parameter under the tensor's own name must equal it element by element. Without one, exactly
    as many parameters must hold its content as tensors of the checkpoint do.

    Parameters
    ----------
    names
        Tensors of the topology.
    read
        Returns a tensor in the subject's storage dtype.
    parameters
        What the subject says it holds; asked for one at a time.
    """
    wanted = list(names)
    named = set(wanted)
    result: dict[str, Arrival] = {}
    for name in wanted:
        if name in parameters:
            result[name] = _under_its_name(name, read(name), np.asarray(parameters[name]))
    lost = [name for name in wanted if name not in result]
    free = [key for key in parameters if key not in named]
    for way, words, in_order in _WAYS:
        if not lost or not free:
            break
        places: dict[str, list[str]] = {}
        for key in free:
            # Turning the parameter around here would be the same; it is the tensor that is turned.
            look = _as_it_is if way is _transposed else way
            places.setdefault(look(np.asarray(parameters[key])), []).append(key)
        for name in tuple(lost):
            found = places.get(way(read(name)))
            if found:
                place = found.pop(0)
                result[name] = Arrival(name, True, words.format(place), in_order)
                lost.remove(name)
                free.remove(place)
    for name in lost:
        result[name] = Arrival(name, False, "no parameter holds its content", False)
    return tuple(result[name] for name in wanted)


def _under_its_name(name: str, tensor: Array, found: Array) -> Arrival:
    if found.shape != tensor.shape:
        detail = f"expected shape {tensor.shape}, found {found.shape}"
        return Arrival(name, False, detail, False)
    if found.dtype != tensor.dtype:
        found, tensor = found.astype(np.float64), tensor.astype(np.float64)
    wrong = int(np.count_nonzero(found != tensor))
    if wrong:
        detail = f"{wrong} of {tensor.size} elements differ"
        return Arrival(name, False, detail, False)
    return Arrival(name, True, "under its own name")
