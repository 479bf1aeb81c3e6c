"""How the copy engine is told of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ENCODE = "runtime.cuTensorMapEncodeTiled"
"""Packed function that describes a tensor: of where to put that, and `tensor_map`."""
SWIZZLE_128, FETCH_128 = 3, 2
"""Boxes lie in swizzled rows of 128 bytes; the L2 cache fetches 128 bytes at a time."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def tensor_map(dtype: str, data: Any, sizes: Sequence[Any], box: Sequence[int]) -> tuple[Any, ...]:
    """Arguments that describe a compact tensor and the boxes that are moved of it.

    Parameters
    ----------
    dtype, data
        Of the tensor; `data` is its pointer.
    sizes, box
        Elements along each dimension, innermost first. A box is at most 128 bytes wide; what of it
        lies outside the tensor is read as zero and not written.
    """
    strides, stride = [], ITEM_BYTES[dtype]
    for size in sizes[:-1]:
        stride = stride * size
        strides.append(stride)
    steps = [1] * len(box)
    return (dtype, len(sizes), data, *sizes, *strides, *box, *steps, 0, SWIZZLE_128, FETCH_128, 0)
