"""Half-precision arrays to a wider dtype and back: eight at a time in torch, one in numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORTH = 1 << 10
"""Elements below which the call itself costs more than what it saves."""


def widen(source: NDArray[Any], out: NDArray[Any]) -> None:
    """Write an array into one of a wider float dtype and the same shape.

    Parameters
    ----------
    source
        Any float dtype; bfloat16 as ml_dtypes has it. Only read.
    out
        float32 or float64, written; a view is fine.
    """
    kind = source.dtype
    # torch knows whole elements alone, in the order of bytes of this machine.
    known = kind.name in ("float16", "bfloat16") and kind.isnative and source.flags.aligned
    if not known or source.size < WORTH or min(source.strides) <= 0:
        np.copyto(out, source, casting="same_kind")
        return
    import torch

    strides = [stride // source.itemsize for stride in source.strides]
    last = sum((n - 1) * stride for n, stride in zip(source.shape, strides, strict=True))
    # torch warns of memory that may not be written; this is only read.
    memory = (ctypes.c_char * ((last + 1) * source.itemsize)).from_address(source.ctypes.data)
    narrow = torch.frombuffer(memory, dtype=getattr(torch, kind.name))
    torch.from_numpy(out).copy_(narrow.as_strided(source.shape, strides))


def widened(source: NDArray[Any]) -> NDArray[np.float64]:
    """Return a copy in float64."""
    return converted(source, np.dtype(np.float64))


def converted(source: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return an array in another float dtype, rounded to nearest; what is too large is infinite.

    Parameters
    ----------
    source
        Any float dtype; only read.
    kind
        Any float dtype; bfloat16 as ml_dtypes has it.
    """
    if kind.itemsize > source.itemsize:
        wide = np.empty(source.shape, kind)
        widen(source, wide)
        return wide
    return _narrowed(source, kind)


def _narrowed(source: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    known = source.dtype == np.float32 and source.dtype.isnative and source.flags.c_contiguous
    if not known or kind.name != "float16" or source.size < WORTH:
        with np.errstate(over="ignore", invalid="ignore"):
            return source.astype(kind)
    import torch

    result = np.empty(source.shape, np.float16)
    memory = (ctypes.c_char * source.nbytes).from_address(source.ctypes.data)
    wide = torch.frombuffer(memory, dtype=torch.float32).view(source.shape)
    torch.from_numpy(result).copy_(wide)
    return result
