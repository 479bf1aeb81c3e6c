"""Element types a checkpoint may store, and what safetensors and PyTorch call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class ElementType:
    """One element type under its names in the formats.

    Attributes
    ----------
    name
        The name used everywhere in this package; PyTorch's, without ``torch.``.
    numpy
        The NumPy dtype of an array that `Checkpoint.read` returns, little-endian.
    safetensors
        Code in a safetensors header.
    storage
        Class name of PyTorch's typed storage, or None where PyTorch pickles only the dtype.
    """

    name: str
    numpy: np.dtype[Any]
    safetensors: str
    storage: str | None = None


_TYPES = (
    ElementType("float64", np.dtype("<f8"), "F64", "DoubleStorage"),
    ElementType("float32", np.dtype("<f4"), "F32", "FloatStorage"),
    ElementType("float16", np.dtype("<f2"), "F16", "HalfStorage"),
    ElementType("bfloat16", np.dtype(ml_dtypes.bfloat16), "BF16", "BFloat16Storage"),
    ElementType("int64", np.dtype("<i8"), "I64", "LongStorage"),
    ElementType("int32", np.dtype("<i4"), "I32", "IntStorage"),
    ElementType("int16", np.dtype("<i2"), "I16", "ShortStorage"),
    ElementType("int8", np.dtype("i1"), "I8", "CharStorage"),
    ElementType("uint64", np.dtype("<u8"), "U64"),
    ElementType("uint32", np.dtype("<u4"), "U32"),
    ElementType("uint16", np.dtype("<u2"), "U16"),
    ElementType("uint8", np.dtype("u1"), "U8", "ByteStorage"),
    ElementType("bool", np.dtype("?"), "BOOL", "BoolStorage"),
    ElementType("complex64", np.dtype("<c8"), "C64", "ComplexFloatStorage"),
    ElementType("complex128", np.dtype("<c16"), "C128", "ComplexDoubleStorage"),
    ElementType("float8_e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3"),
    ElementType("float8_e5m2", np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2"),
    ElementType("float8_e8m0fnu", np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E8M0"),
)

BY_NAME = {t.name: t for t in _TYPES}
BY_SAFETENSORS = {t.safetensors: t for t in _TYPES}
BY_STORAGE = {t.storage: t for t in _TYPES if t.storage is not None}
BY_NUMPY = {t.numpy: t for t in _TYPES}

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Names of the types that hold weights as ordinary floating point numbers."""
