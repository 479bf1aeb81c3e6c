"""Kernels for processors, and the operations made of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tvm
from tvm.relax.frontend.nn import Tensor, op

from relax_impl.attention import Attention
from relax_impl.cached import CachedAttention
from relax_impl.kernels.cpu.attention import flash
from relax_impl.kernels.cpu.cached import over_cache
from relax_impl.kernels.cpu.linear import linear_kernel
from relax_impl.kernels.cpu.rowwise import gelu_kernel, norm_kernel, residual_kernel
from relax_impl.layout import PANELS
from relax_impl.operations import PLAIN, scaled
from relax_impl.target import wide_vectors

if TYPE_CHECKING:
    from relax_impl.model import MPTEmbedding, MPTLinear, MPTNorm


def _on_rows(
    kernel: tvm.tirx.PrimFunc, name: str, x: Tensor, rest: list[Tensor], width: int, dtype: str
) -> Tensor:
    """Call a kernel over the rows of x (b, s, features).

    The kernels take all three axes: a reshape of what a function returns would be a copy.
    """
    b, s, _ = x.shape
    out = Tensor.placeholder((b, s, width), dtype)
    return op.tensor_ir_op(kernel, name, [x, *rest], out)


def product(x: Tensor, linear: MPTLinear, out_dtype: str) -> Tensor:
    """Multiply by the weight, add the bias, round once to `out_dtype`."""
    bias = [] if linear.bias is None else [linear.bias]
    kernel = linear_kernel(
        linear.rows, int(x.shape[-1]), x.dtype, out_dtype, bool(bias), wide_vectors()
    )
    return _on_rows(kernel, "linear", x, [linear.weight, *bias], linear.rows, out_dtype)


def linear(x: Tensor, linear: MPTLinear) -> Tensor:
    """Linear layer, see `operations.linear`."""
    return product(x, linear, x.dtype)


def unembed(hidden: Tensor, table: MPTEmbedding, logit_scale: float | None) -> Tensor:
    """Logits in float32, see `operations.unembed`."""
    return scaled(product(hidden, table, "float32"), logit_scale)


def norm(x: Tensor, norm: MPTNorm) -> Tensor:
    """Layer norm or RMS norm, see `operations.norm`."""
    width = int(x.shape[-1])
    bias = [] if norm.bias is None else [norm.bias]
    kernel = norm_kernel(width, x.dtype, norm.epsilon, norm.is_rms, bool(bias))
    return _on_rows(kernel, "norm", x, [norm.weight, *bias], width, x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function, see `operations.gelu`."""
    width = int(x.shape[-1])
    return _on_rows(gelu_kernel(width, x.dtype), "gelu", x, [], width, x.dtype)


def residual(x: Tensor, update: Tensor) -> Tensor:
    """Stream plus update, see `operations.residual`."""
    width = int(x.shape[-1])
    return _on_rows(residual_kernel(width, x.dtype), "residual", x, [update], width, x.dtype)


FAST = dataclasses.replace(
    PLAIN,
    norm=norm,
    linear=linear,
    attention=Attention(lowering=flash),
    cached=CachedAttention(lowering=over_cache),
    activation=gelu,
    residual=residual,
    unembed=unembed,
    layout=PANELS,
)
"""Every heavy operation as a kernel of this directory."""
