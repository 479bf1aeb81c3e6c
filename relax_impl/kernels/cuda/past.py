"""Attention of new tokens over a cache, to which it adds their keys and values."""

from __future__ import annotations

import dataclasses

from tvm.relax.frontend.nn import Tensor
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_impl.cached import PANEL, Past
from relax_impl.config import MPTConfig
from relax_impl.kernels.cuda.library import call
from relax_impl.kernels.cuda.source import C_TYPES, attributes, source

SPLITS, THREADS, CHUNK = 8, 128, 4
"""Blocks of a cluster, threads of a block, and queries of a cluster, as in ``past.cuh``."""
NARROW, WIDEST = 128, 256
RESIDENT = 4
"""Blocks on a multiprocessor, of 128 registers a thread; half where heads exceed `NARROW`."""


@dataclasses.dataclass(frozen=True)
class OverPast:
    """Attention of s new tokens over what a cache holds and over themselves, for any b, s and size.

    Parameters
    ----------
    heads, kv_heads, dim
        Query heads, key heads and features of a head (a multiple of 8, at most `WIDEST`).
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
        parts = ["past", self.dtype, self.heads, self.kv_heads, self.dim]
        parts += [*self.widths, *self.columns, float(self.scale).hex()] + ["alibi"] * self.alibi
        return "".join(c if c.isalnum() else "_" for c in "_".join(map(str, parts)))

    def __call__(self, name: str) -> PrimFunc:
        """Make the kernel: q, k, v, keys, values (both written), slopes, lengths, starts, out."""
        heads, kv_heads, dim, dtype = self.heads, self.kv_heads, self.dim, self.dtype
        scale = self.scale
        (WQ, WK, WV), (q_column, k_column, v_column) = self.widths, self.columns
        resident = RESIDENT if dim <= NARROW else RESIDENT // 2
        alibi = "true" if self.alibi else "false"
        of = f"{C_TYPES[dtype]}, {dim}, {alibi}"
        function = f"mpt_past_{dtype}_{dim}_{alibi}"
        code = source() + _entry(function, C_TYPES[dtype], of)

        @T.prim_func
        def over_past(
            q_: T.handle,
            k_: T.handle,
            v_: T.handle,
            keys_: T.handle,
            values_: T.handle,
            slopes_: T.handle,
            lengths_: T.handle,
            starts_: T.handle,
            out_: T.handle,
        ) -> None:
            T.func_attr(attributes(name))
            B = T.int32()
            S = T.int32()
            P = T.int32()
            q = T.match_buffer(q_, (B, S, WQ), dtype, align=16)
            k = T.match_buffer(k_, (B, S, WK), dtype, align=16)
            v = T.match_buffer(v_, (B, S, WV), dtype, align=16)
            keys = T.match_buffer(keys_, (B, kv_heads, P, dim, PANEL), dtype, align=16)
            values = T.match_buffer(values_, (B, kv_heads, P * PANEL, dim), dtype, align=16)
            slopes = T.match_buffer(slopes_, (heads,), "float32")
            lengths = T.match_buffer(lengths_, (B,), "int32")
            starts = T.match_buffer(starts_, (B,), "int32")
            out = T.match_buffer(out_, (B, S, heads * dim), dtype, align=16)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
            _rank = T.cta_id_in_cluster([SPLITS])
            _block = T.cta_id([SPLITS * heads * B * ((S + CHUNK - 1) // CHUNK)])
            _thread = T.thread_id([THREADS])
            T.evaluate(
                T.cuda.func_call(
                    function,
                    q.data,
                    k.data,
                    v.data,
                    keys.data,
                    values.data,
                    slopes.data,
                    lengths.data,
                    starts.data,
                    out.data,
                    WQ,
                    WK,
                    WV,
                    q_column,
                    k_column,
                    v_column,
                    S,
                    P,
                    heads,
                    kv_heads,
                    T.float32(scale),
                    source_code=code,
                )
            )

        return over_past


def _entry(name: str, c_type: str, of: str) -> str:
    """Write the function that gathers the arguments; a text may come more than once."""
    return f"""#ifndef {name}_
#define {name}_
__device__ __forceinline__ void {name}(
    const {c_type}* q, const {c_type}* k, const {c_type}* v, {c_type}* keys, {c_type}* values,
    const float* slopes, const int* lengths, const int* starts, {c_type}* out, int q_width,
    int k_width, int v_width, int q_column, int k_column, int v_column, int count, int panels,
    int heads, int kv_heads, float scale) {{
  mpt::attention_over_past<{of}>(mpt::PastArguments<{c_type}>{{
      q, k, v, q_width, k_width, v_width, q_column, k_column, v_column, keys, values, slopes,
      lengths, starts, out, count, panels, heads, kv_heads, scale}});
}}
#endif
"""


def fits(dtype: str, dim: int) -> bool:
    """Whether the kernel is written for heads of `dim` features."""
    return dtype in ("float16", "bfloat16") and dim % 8 == 0 and dim <= WIDEST


def over_past(
    tensors: tuple[Tensor, Tensor, Tensor], columns: tuple[int, int, int], slopes: Tensor,
    scale: float, config: MPTConfig, past: Past,
) -> Tensor:  # fmt: skip
    """Emit the attention; the context is (b, s, heads * dim), and the cache is changed in place.

    Parameters
    ----------
    tensors, columns
        What holds q, k and v, each (b, s, width), and the column where each begins.
    slopes
        Of every query head, float32.
    scale
        Factor of q.k.
    config, past
        The model, and what the layer is given of the past.
    """
    b, s, _ = tensors[0].shape
    widths = tuple(int(tensor.shape[-1]) for tensor in tensors)
    heads = (config.n_heads, config.kv_n_heads, config.head_dim)
    dtype = str(tensors[0].dtype)
    kernel = OverPast(*heads, dtype, scale, config.alibi, widths, columns)  # type: ignore[arg-type]
    arguments = [*tensors, past.keys, past.values, slopes, past.lengths, past.starts]
    return call(kernel.kind(), kernel, arguments, (b, s, config.d_model), dtype)
