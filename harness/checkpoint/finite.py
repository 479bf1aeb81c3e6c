"""Weights that are not numbers."""

from __future__ import annotations

import numpy as np

from harness.checkpoint.dtypes import FLOATS
from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput

_STEP = 2**22


def check_finite(checkpoint: Checkpoint) -> int:
    """Require every floating point element of every entry to be finite.

    Returns
    -------
    int
        Number of elements looked at.

    Raises
    ------
    BadInput
        Names the tensor and the first index that holds an infinity or NaN.
    """
    looked = 0
    for info, array in checkpoint.arrays():
        if info.dtype not in FLOATS:
            continue
        flat = array.reshape(-1)
        for start in range(0, flat.size, _STEP):
            part = flat[start : start + _STEP]
            bad = np.flatnonzero(~np.isfinite(part))
            if bad.size:
                index = tuple(int(i) for i in np.unravel_index(start + bad[0], info.shape))
                raise BadInput(
                    f"tensor {info.name!r} is not finite at index {list(index)}",
                    where=str(checkpoint.path / info.file),
                    expected="finite weights",
                    found=str(part[bad[0]]),
                )
        looked += flat.size
    return looked
