"""Rounding on the way: what a narrower dtype makes of a value that goes on in a wider one.

A cast to bfloat16 and back does not do it. No processor computes in bfloat16, so the compiler
replaces it by float32 where it is only passed through, and the rounding is gone; a fault made of it
changes the graph and not one number. Here its bits are rounded one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import op
from tvm.script import tirx as T

from relax_impl.attention import cast

_KEPT = -(1 << 16)
"""The upper half of a float32, which is a bfloat16, as a mask for an int32."""


def _bfloat16(value: Any) -> Any:
    """Round a float32 expression to the nearest bfloat16, ties to even; finite values only."""
    lanes = value.ty.dtype.lanes
    suffix = "" if lanes == 1 else f"x{lanes}"
    bits = T.reinterpret(f"int32{suffix}", value)
    odd = tirx.bitwise_and(tirx.shift_right(bits, 16), 1)
    return T.reinterpret(f"float32{suffix}", tirx.bitwise_and(bits + 0x7FFF + odd, _KEPT))


def through(dtype: str) -> Callable[[Any], Any]:
    """Return the rounding of a float32 expression, of any number of lanes, to ``dtype``."""
    if dtype == "bfloat16":
        return _bfloat16
    return lambda value: cast(cast(value, dtype), "float32")


def passed(x: Any, dtype: str) -> Any:
    """Return a tensor of the graph rounded to ``dtype`` and back to its own."""
    function = through(dtype)

    def emit(x: Any) -> Any:
        def element(*at: Any) -> Any:
            return cast(function(cast(tirx.convert(x[at]), "float32")), x.dtype)

        return te.compute(x.shape, element, name="passed")

    return op.tensor_expr_op(emit, "passed", [x])
