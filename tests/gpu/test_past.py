"""Attention over a cache on the device: context and what is stored, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm

from relax_impl.cached import PANEL
from relax_impl.kernels.cuda.library import wgmma_target
from relax_impl.kernels.cuda.past import OverPast
from relax_impl.target import resolve

pytestmark = pytest.mark.gpu

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
CASES = [
    # dim, heads, key heads, past of each sequence, new tokens, padding on the left
    (128, 4, 4, (1023,), 1, (0,)),
    (128, 4, 2, (2047, 16, 0), 1, (0, 3, 0)),
    (64, 3, 3, (5, 128), 1, (0, 0)),
    (80, 2, 1, (300,), 7, (0,)),
    (112, 2, 2, (0, 0), 130, (0, 9)),
    (72, 2, 2, (15, 40), 6, (2, 41)),
    (256, 1, 1, (33,), 3, (0,)),
]


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "past", "new", "starts"), CASES)
def test_attention_over_a_past(
    dim: int, heads: int, kv_heads: int, past: tuple[int, ...], new: int, starts: tuple[int, ...],
    dtype: str,
) -> None:  # fmt: skip
    batch, d, kv = len(past), heads * dim, kv_heads * dim
    random, storage = np.random.default_rng(dim), NUMPY[dtype]
    panels = -(-(max(past) + new) // PANEL)
    qkv = random.standard_normal((batch, new, d + 2 * kv)).astype(storage)
    k, v = (
        random.standard_normal((batch, kv_heads, panels * PANEL, dim)).astype(storage)
        for _ in range(2)
    )
    for n, length in enumerate(past):
        k[n, :, length:], v[n, :, length:] = np.nan, np.nan
    packed = k.reshape(batch, kv_heads, panels, PANEL, dim).swapaxes(-1, -2)
    slopes = np.exp2(-np.arange(1, heads + 1)).astype(np.float32)
    width, columns, scale = d + 2 * kv, (0, d, d + kv), 0.7 * dim**-0.5
    kernel = OverPast(heads, kv_heads, dim, dtype, scale, True, (width,) * 3, columns)
    module = tvm.IRModule({"kernel": kernel("kernel")})
    built = tvm.compile(module, target=wgmma_target(resolve("cuda")), tir_pipeline="tirx")
    arrays = [qkv, qkv, qkv, packed, v, slopes, np.array(past, np.int32)]
    arrays += [np.array(starts, np.int32), np.full((batch, new, d), np.nan, storage)]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a), tvm.cuda(0)) for a in arrays]
    built["kernel"](*tensors)
    keys, values, out = (tensors[i].numpy() for i in (3, 4, 8))

    def fresh(column: int, count: int) -> np.ndarray:
        part = qkv[..., column : column + count * dim]
        return part.reshape(batch, new, count, dim).swapaxes(1, 2)

    queries = fresh(0, heads).astype(np.float64)
    out = out.reshape(batch, new, heads, dim).astype(np.float64)
    stored = keys.swapaxes(-1, -2).reshape(k.shape)
    for n, length in enumerate(past):
        end = length + new
        k[n, :, length:end], v[n, :, length:end] = fresh(d, kv_heads)[n], fresh(d + kv, kv_heads)[n]
        assert np.array_equal(stored[n, :, :end], k[n, :, :end])
        assert np.array_equal(values[n, :, :end], v[n, :, :end])
        for h in range(heads):
            group = h // (heads // kv_heads)
            for i in range(new):
                seen = slice(starts[n], length + i + 1)
                if seen.start >= seen.stop:
                    assert not out[n, i, h].any()
                    continue
                s = k[n, group, seen].astype(np.float64) @ queries[n, h, i] * scale
                s += slopes[h] * (np.arange(seen.start, seen.stop) - length - i)
                p = np.exp(s - s.max())
                p /= p.sum()
                weights = v[n, group, seen].astype(np.float64)
                # Scores lie off by at most some 2^-20 of their size, which here is below 64.
                allowed = UNIT[dtype] * abs(p @ weights) + 2.0**-14 * (p @ abs(weights))
                assert (abs(out[n, i, h] - p @ weights) <= allowed).all()
