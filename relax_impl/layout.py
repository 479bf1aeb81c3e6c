"""How a weight matrix lies in memory: row by row as in the checkpoint, or packed in panels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op


@dataclasses.dataclass(frozen=True)
class Layout:
    """Storage order of a weight of `rows` output and `columns` input features.

    Parameters
    ----------
    name
        For messages.
    width
        0 keeps [rows, columns]. A positive width stores panels of `width` rows with the rows
        innermost, [ceil(rows / width), columns, width], so that a kernel reads `width` output
        features of one input feature as one vector. The last panel is filled up with zeros.
    """

    name: str
    width: int = 0

    def panels(self, rows: int) -> int:
        """Number of panels that hold `rows` rows."""
        return -(-rows // self.width)

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        if not self.width:
            return (rows, columns)
        return (self.panels(rows), columns, self.width)

    def store(self, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Bring a [rows, columns] array into this layout."""
        if not self.width:
            return weight
        rows, columns = weight.shape
        stored = np.zeros((self.panels(rows) * self.width, columns), weight.dtype)
        stored[:rows] = weight
        stored = stored.reshape(self.panels(rows), self.width, columns)
        return np.ascontiguousarray(stored.transpose(0, 2, 1))

    def restore(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Undo `store` within the graph: the [rows, columns] tensor."""
        if not self.width:
            return stored

        def unpack(panels: Any) -> Any:
            from tvm import te

            return te.compute(
                (rows, columns),
                lambda n, k: panels[n // self.width, k, n % self.width],
                name="unpack",
            )

        return op.tensor_expr_op(unpack, "unpack", [stored])

    def element(self, stored: Any, row: Any, column: Any) -> tirx.Expr:
        """Element of the matrix, as an expression over the stored buffer."""
        if not self.width:
            return stored[row, column]
        return stored[row // self.width, column, row % self.width]


ROWS = Layout("rows")
PANELS = Layout("panels", 16)
