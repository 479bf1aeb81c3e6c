"""What rounding a checkpoint's weights to a storage dtype costs: counted, not guessed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from harness.measure.oracle import stored
from harness.measure.records import Conversion

if TYPE_CHECKING:
    from harness.checkpoint.reader import Checkpoint


def conversion(names: Iterable[str], checkpoint: Checkpoint, dtype: str) -> Conversion | None:
    """Count what changed, or return ``None`` where the checkpoint is in ``dtype`` already."""
    source = checkpoint.storage_dtype
    if source == dtype:
        return None
    read = stored(checkpoint.read, dtype)
    elements = overflowed = flushed = inexact = 0
    for name in names:
        before = checkpoint.read(name).astype(np.float64)
        after = read(name).astype(np.float64)
        elements += before.size
        overflowed += int((np.isinf(after) & np.isfinite(before)).sum())
        flushed += int(((after == 0) & (before != 0)).sum())
        inexact += int((after != before).sum())
    return Conversion(source, dtype, elements, overflowed, flushed, inexact)
