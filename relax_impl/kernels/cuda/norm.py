"""Layer norm and RMS norm of rows."""

from __future__ import annotations

import dataclasses

from tvm.relax.frontend.nn import Tensor
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_impl.kernels.cuda.library import call
from relax_impl.kernels.cuda.source import C_TYPES, attributes, source

WARPS, LONG = 4, 2048
"""Warps of a block, as in ``norm.cuh``: for a row each, or for one of at least so many elements."""
WIDEST = 16384
"""Wider rows are left to the portable norm: they would leave the registers."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """Norm of x (b, s, width), for any b and s; float32 inside, rounded once.

    Parameters
    ----------
    width
        A multiple of 8, at most `WIDEST`.
    dtype
        float16 or bfloat16.
    epsilon
        Added to the mean square.
    rms
        Whether the mean is left where it is.
    bias
        Whether an offset is added.
    """

    width: int
    dtype: str
    epsilon: float
    rms: bool
    bias: bool

    def kind(self) -> str:
        """Identifier of this kernel among all."""
        parts = ["rms" if self.rms else "norm", self.dtype, str(self.width)]
        parts += ["bias"] * self.bias + [float(self.epsilon).hex()]
        return "".join(c if c.isalnum() else "_" for c in "_".join(parts))

    def __call__(self, name: str) -> PrimFunc:
        """Make the kernel: x, weight, bias (anything of its shape if there is none), out."""
        width, dtype, epsilon = self.width, self.dtype, self.epsilon
        flags = ", ".join("true" if flag else "false" for flag in (self.rms, self.bias))
        per_block = WARPS if width < LONG else 1
        function, code = f"mpt::norm<{C_TYPES[dtype]}, {width}, {flags}>", source()

        @T.prim_func
        def norm(x_: T.handle, weight_: T.handle, bias_: T.handle, out_: T.handle) -> None:
            T.func_attr(attributes(name))
            B = T.int32()
            S = T.int32()
            x = T.match_buffer(x_, (B, S, width), dtype, align=16)
            weight = T.match_buffer(weight_, (width,), dtype, align=16)
            bias = T.match_buffer(bias_, (width,), dtype, align=16)
            out = T.match_buffer(out_, (B, S, width), dtype, align=16)
            T.device_entry()
            _block = T.cta_id([(B * S + per_block - 1) // per_block])
            _thread = T.thread_id([WARPS * 32])
            T.evaluate(
                T.cuda.func_call(
                    function,
                    x.data,
                    weight.data,
                    bias.data,
                    out.data,
                    B * S,
                    T.float32(epsilon),
                    source_code=code,
                )
            )

        return norm


def fits(dtype: str, width: int) -> bool:
    """Whether the kernel can normalise rows of this width."""
    return dtype in ("float16", "bfloat16") and width % 8 == 0 and width <= WIDEST


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, rms: bool) -> Tensor:
    """Emit the norm of x (b, s, width)."""
    kernel = Norm(int(x.shape[-1]), str(x.dtype), epsilon, rms, bias is not None)
    arguments = [x, weight, weight if bias is None else bias]
    return call(kernel.kind(), kernel, arguments, x.shape, kernel.dtype)
