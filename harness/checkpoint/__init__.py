"""Reading checkpoints tensor by tensor, and writing them; knows no model.

Importing this package imports neither torch nor safetensors.
"""

from __future__ import annotations

from harness.checkpoint.entry import Entry, TensorInfo
from harness.checkpoint.finite import check_finite
from harness.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "Entry", "TensorInfo", "check_finite"]
