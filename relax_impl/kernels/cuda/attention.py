"""Causal attention with ALiBi over queries, keys and values that may lie in one buffer."""

from __future__ import annotations

import dataclasses

from tvm.relax.frontend.nn import Tensor
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_impl.kernels.cuda.library import call
from relax_impl.kernels.cuda.maps import ENCODE, tensor_map
from relax_impl.kernels.cuda.source import C_TYPES, HEAD_DIMS, attributes, source

TILE, COLUMNS, FETCHED = 128, 64, 2


@dataclasses.dataclass(frozen=True)
class Flash:
    """Attention of the last sq of sk positions, for any batch, sq and sk.

    Parameters
    ----------
    heads, kv_heads, dim
        Query heads, key heads and features of a head (one of `HEAD_DIMS`).
    dtype
        float16 or bfloat16.
    scale
        Factor of q.k.
    alibi
        Whether slopes count.
    widths, columns
        Of the tensors (b, s, width) that hold q, k and v: their width, and where the heads begin.
    """

    heads: int
    kv_heads: int
    dim: int
    dtype: str
    scale: float
    alibi: bool
    widths: tuple[int, int, int]
    columns: tuple[int, int, int]

    def kind(self) -> str:
        """Identifier of this kernel among all."""
        parts = ["attention", self.dtype, self.heads, self.kv_heads, self.dim]
        parts += [*self.widths, *self.columns, float(self.scale).hex()] + ["alibi"] * self.alibi
        return "".join(c if c.isalnum() else "_" for c in "_".join(map(str, parts)))

    def shared_bytes(self) -> int:
        """Shared memory of a block: queries, and keys and values in advance; ten barriers."""
        panels = -(-self.dim // COLUMNS)
        return (1 + 2 * FETCHED) * panels * TILE * COLUMNS * 2 + 10 * 8

    def __call__(self, name: str) -> PrimFunc:
        """Make the kernel: q, k, v, slopes (heads,), out (b, sq, heads * dim)."""
        heads, dim, dtype, scale = self.heads, self.dim, self.dtype, self.scale
        (WQ, WK, WV), (q_column, k_column, v_column) = self.widths, self.columns
        group, shared_bytes = self.heads // self.kv_heads, self.shared_bytes()
        alibi = "true" if self.alibi else "false"
        function, code = f"mpt::attention<{C_TYPES[dtype]}, {dim}, {alibi}>", source()

        @T.prim_func
        def attention(
            q_: T.handle, k_: T.handle, v_: T.handle, slopes_: T.handle, out_: T.handle
        ) -> None:
            T.func_attr(attributes(name))
            B = T.int32()
            SQ = T.int32()
            SK = T.int32()
            q = T.match_buffer(q_, (B, SQ, WQ), dtype, align=16)
            k = T.match_buffer(k_, (B, SK, WK), dtype, align=16)
            v = T.match_buffer(v_, (B, SK, WV), dtype, align=16)
            slopes = T.match_buffer(slopes_, (heads,), "float32")
            out = T.match_buffer(out_, (B, SQ, heads * dim), dtype, align=16)
            q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, q_map, *tensor_map(dtype, q.data, (WQ, SQ, B), (COLUMNS, TILE, 1))
            )
            k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, k_map, *tensor_map(dtype, k.data, (WK, SK, B), (COLUMNS, TILE, 1))
            )
            v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.call_packed(
                ENCODE, v_map, *tensor_map(dtype, v.data, (WV, SK, B), (COLUMNS, TILE, 1))
            )
            T.device_entry()
            _head, _tile, _batch = T.cta_id([heads, (SQ + TILE - 1) // TILE, B])
            _thread = T.thread_id([384])
            pool = T.SMEMPool()
            shared = pool.alloc((shared_bytes,), "uint8", align=1024)
            pool.commit()
            T.evaluate(
                T.cuda.func_call(
                    function,
                    T.address_of(q_map),
                    T.address_of(k_map),
                    T.address_of(v_map),
                    slopes.data,
                    out.data,
                    SQ,
                    SK,
                    group,
                    q_column,
                    k_column,
                    v_column,
                    T.float32(scale),
                    shared.ptr_to([0]),
                    source_code=code,
                )
            )

        return attention


def fits(dtype: str, dim: int) -> bool:
    """Whether the kernel is written for heads of `dim` features."""
    return dtype in ("float16", "bfloat16") and dim in HEAD_DIMS


def flash(
    tensors: tuple[Tensor, Tensor, Tensor], columns: tuple[int, int, int], slopes: Tensor,
    heads: tuple[int, int, int], scale: float, alibi: bool,
) -> Tensor:  # fmt: skip
    """Emit the attention; the context is (b, sq, heads * dim).

    Parameters
    ----------
    tensors, columns
        What holds q, k and v, each (b, s, width), and the column where each begins.
    slopes
        Of every query head, float32.
    heads
        Query heads, key heads and features of a head.
    scale, alibi
        See `Flash`.
    """
    b, sq, _ = tensors[0].shape
    wq, wk, wv = (int(tensor.shape[-1]) for tensor in tensors)
    dtype = str(tensors[0].dtype)
    kernel = Flash(*heads, dtype, scale, alibi, (wq, wk, wv), columns)
    shape = (b, sq, heads[0] * heads[2])
    return call(kernel.kind(), kernel, [*tensors, slopes], shape, dtype)
