"""The one place where cases write with torch: a shard as `torch.save` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def save(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays (float16, float32 or ml_dtypes' bfloat16) as a dictionary of tensors."""
    torch.save({name: _tensor(array) for name, array in arrays.items()}, file)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype == "bfloat16":
        # torch reads no ml_dtypes array; the same bits travel as integers.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
