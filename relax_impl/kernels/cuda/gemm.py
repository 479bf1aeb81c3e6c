"""Matrix products with everything that follows them: bias, clipping, GELU, the residual stream."""

from __future__ import annotations

import dataclasses

from tvm.relax.frontend.nn import Tensor
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_impl.kernels.cuda.library import call
from relax_impl.kernels.cuda.maps import ENCODE, ITEM_BYTES, tensor_map
from relax_impl.kernels.cuda.source import C_TYPES, attributes, source

TILE_M, TILE_K = 128, 64
HALF_ROWS, FEW_ROWS, WIDE_ROWS, PART_ROWS = 64, 8, 128, 32
"""Rows that are fetched at once: half of a tile of x or a few, and of a weight many or few."""
BLOCKS = 132
"""Multiprocessors of an H100 SXM; with fewer, blocks wait for their turn."""
SHARED = 4 * (TILE_M + 256) * TILE_K * 2 + 2 * 8 * 8 + 4 * 64 * 128 + 64
"""Ring of operands, its barriers, and boxes of results; as in ``tiles.cuh``."""


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Product of x (b, s, k) and a weight [n, k], for any b and s.

    Parameters
    ----------
    n, k
        Multiples of 8, as the copy engine moves 16 bytes at least.
    dtype, out_dtype
        Of the operands, float16 or bfloat16; and of the result, the same or float32.
    bias
        Whether a bias (n,) is added.
    clip
        Limit of the absolute value, or None.
    gelu
        Whether GELU follows.
    residual
        Whether a stream (b, s, n) is added last.
    """

    n: int
    k: int
    dtype: str
    out_dtype: str
    bias: bool = False
    clip: float | None = None
    gelu: bool = False
    residual: bool = False

    def kind(self) -> str:
        """Identifier of this kernel among all."""
        parts = ["gemm", self.dtype, self.out_dtype, f"{self.n}x{self.k}"]
        parts += [name for name in ("bias", "gelu", "residual") if getattr(self, name)]
        if self.clip is not None:
            parts.append("clip" + float(self.clip).hex())
        return "".join(c if c.isalnum() else "_" for c in "_".join(parts))

    def device_function(self) -> str:
        """The instance of the device function."""
        flags = (self.bias, self.clip is not None, self.gelu, self.residual)
        values = ", ".join("true" if flag else "false" for flag in flags)
        return f"mpt::gemm<{C_TYPES[self.dtype]}, {C_TYPES[self.out_dtype]}, {values}>"

    def __call__(self, name: str) -> PrimFunc:
        """Make the kernel: x, weight, bias, residual, out; what is not used may be anything."""
        N, K, dtype, out_dtype = self.n, self.k, self.dtype, self.out_dtype
        bias_shape = (N,) if self.bias else (N, K)
        residual_width = N if self.residual else K
        limit = float(self.clip or 0)
        function, code = self.device_function(), source()
        box = 128 // ITEM_BYTES[out_dtype]

        @T.prim_func
        def gemm(
            x_: T.handle, weight_: T.handle, bias_: T.handle, residual_: T.handle, out_: T.handle
        ) -> None:
            T.func_attr(attributes(name))
            B = T.int32()
            S = T.int32()
            x = T.match_buffer(x_, (B, S, K), dtype, align=16)
            weight = T.match_buffer(weight_, (N, K), dtype, align=16)
            bias = T.match_buffer(bias_, bias_shape, dtype, align=16)
            residual = T.match_buffer(residual_, (B, S, residual_width), dtype, align=16)
            out = T.match_buffer(out_, (B, S, N), out_dtype, align=16)
            x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(ENCODE, x_map, *tensor_map(dtype, x.data, (K, B * S), (TILE_K, TILE_M)))
            half_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, half_map, *tensor_map(dtype, x.data, (K, B * S), (TILE_K, HALF_ROWS))
            )
            few_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, few_map, *tensor_map(dtype, x.data, (K, B * S), (TILE_K, FEW_ROWS))
            )
            weight_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, weight_map, *tensor_map(dtype, weight.data, (K, N), (TILE_K, WIDE_ROWS))
            )
            part_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, part_map, *tensor_map(dtype, weight.data, (K, N), (TILE_K, PART_ROWS))
            )
            out_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(ENCODE, out_map, *tensor_map(out_dtype, out.data, (N, B * S), (box, 64)))
            T.device_entry()
            _rank = T.cta_id_in_cluster([2])
            _block = T.cta_id([BLOCKS])
            _thread = T.thread_id([384])
            pool = T.SMEMPool()
            shared = pool.alloc((SHARED,), "uint8", align=1024)
            pool.commit()
            T.evaluate(
                T.cuda.func_call(
                    function,
                    T.address_of(x_map),
                    T.address_of(half_map),
                    T.address_of(few_map),
                    T.address_of(weight_map),
                    T.address_of(part_map),
                    T.address_of(out_map),
                    x.data,
                    weight.data,
                    out.data,
                    bias.data,
                    residual.data,
                    B * S,
                    N,
                    K,
                    BLOCKS,
                    T.float32(limit),
                    shared.ptr_to([0]),
                    source_code=code,
                )
            )

        return gemm


def fits(dtype: str, n: int, k: int) -> bool:
    """Whether the kernel can multiply by a weight [n, k]."""
    return dtype in ("float16", "bfloat16") and n % 8 == 0 and k % 8 == 0


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: str | None = None,
    clip: float | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Emit the product of x (b, s, k) and weight [n, k]; see `Gemm`."""
    b, s, k = x.shape
    n = int(weight.shape[0])
    dtype = str(x.dtype)
    out_dtype = out_dtype or dtype
    kernel = Gemm(n, int(k), dtype, out_dtype, bias is not None, clip, gelu, residual is not None)
    arguments = [
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
    ]
    return call(kernel.kind(), kernel, arguments, (b, s, n), out_dtype)
