"""What rounding a checkpoint's weights to a storage dtype costs: counted, not guessed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.measure.records import Conversion

if TYPE_CHECKING:
    from harness.checkpoint.reader import Checkpoint

_PIECE = 2**22


def conversion(names: Iterable[str], checkpoint: Checkpoint, dtype: str) -> Conversion | None:
    """Count what changed, or return ``None`` where the checkpoint is in ``dtype`` already."""
    source = checkpoint.storage_dtype
    if source == dtype:
        return None
    target = BY_NAME[dtype].numpy
    elements = overflowed = flushed = inexact = 0
    for name in names:
        flat = checkpoint.read(name).reshape(-1)
        elements += flat.size
        for start in range(0, flat.size, _PIECE):
            before = flat[start : start + _PIECE].astype(np.float64)
            with np.errstate(over="ignore"):
                after = before.astype(target).astype(np.float64)
            overflowed += int((np.isinf(after) & np.isfinite(before)).sum())
            flushed += int(((after == 0) & (before != 0)).sum())
            inexact += int((after != before).sum())
    return Conversion(source, dtype, elements, overflowed, flushed, inexact)
