"""Did every tensor arrive? The parameters of a subject against the checkpoint, by content."""

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
        Where it was found, or what stands in its place.
    """

    tensor: str
    arrived: bool
    detail: str


def _content(array: Array) -> str:
    """Return a digest of the nonzero elements whatever their order.

    Packed layouts permute and pad; orientation is judged by the taps and by the mapper's proof.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(np.uint16 if flat.dtype.itemsize == 2 else np.uint32)
    values = np.sort(bits[flat != 0])
    return f"{values.size}:{hashlib.sha256(values.tobytes()).hexdigest()}"


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
        What the subject says it holds.
    """
    wanted = list(names)
    unnamed = {k: np.asarray(v) for k, v in parameters.items() if k not in set(wanted)}
    held: dict[str, list[str]] | None = None
    result = []
    claims: dict[str, int] = {}
    for name in wanted:
        tensor = read(name)
        if name in parameters:
            found = np.asarray(parameters[name])
            same = found.shape == tensor.shape and bool(
                (found.astype(np.float64) == tensor.astype(np.float64)).all()
            )
            what = "under its own name" if same else _difference(found, tensor)
            result.append(Arrival(name, same, what))
            continue
        if held is None:
            held = {}
            for key, value in unnamed.items():
                if value.dtype == tensor.dtype:
                    held.setdefault(_content(value), []).append(key)
        digest = _content(tensor)
        places = held.get(digest, [])
        used = claims.get(digest, 0)
        claims[digest] = used + 1
        if used < len(places):
            result.append(Arrival(name, True, f"as {places[used]}"))
        else:
            result.append(Arrival(name, False, "no parameter holds its content"))
    return tuple(result)


def _difference(found: Array, tensor: Array) -> str:
    if found.shape != tensor.shape:
        return f"expected shape {tensor.shape}, found {found.shape}"
    wrong = int((found.astype(np.float64) != tensor.astype(np.float64)).sum())
    return f"{wrong} of {tensor.size} elements differ"
