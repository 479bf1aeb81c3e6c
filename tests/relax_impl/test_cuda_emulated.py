"""Kernels for Hopper, run on the processor as `device.hpp` stands for a device."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relax_impl.kernels.cuda as cuda

HERE, KERNELS = Path(__file__).parent, Path(cuda.__file__).parent
PANEL = 16


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("device") / "device.so"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-Wno-unknown-pragmas"]
    places = [f"-I{HERE}", f"-I{KERNELS}"]
    source = str(HERE / "device.cpp")
    subprocess.run(["g++", *flags, *places, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> Any:
    assert array.flags["C_CONTIGUOUS"]
    return array.ctypes.data_as(ctypes.c_void_p)


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float16)


def exact(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw numbers of which float32 holds every sum of thousands of products, in any order."""
    return (np.random.default_rng(seed).integers(-31, 32, shape) / 32).astype(np.float16)


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 40, 64), (1, 8, 2056), (2, 72, 1032), (3, 200, 1024), (4, 16, 4104), (1, 104, 8)],
)
def test_few_rows(device: Any, rows: int, n: int, k: int) -> None:
    a, b, residual = exact((rows, k), 1), exact((n, k), 2), exact((rows, n), 3)
    out = np.full((rows, n), np.nan, np.float16)
    # Blocks of the device, and fewer than rows need: a warp takes several pairs.
    for blocks in (1, 3):
        done = device.multiply(
            pointer(a), pointer(b), pointer(residual), pointer(out), rows, n, k, blocks, 229504
        )
        assert done == 0
        wide = a.astype(np.float64) @ b.astype(np.float64).T + residual
        assert np.array_equal(out, wide.astype(np.float16))


def test_rows_that_do_not_fit_go_another_way(device: Any) -> None:
    nothing = np.zeros(1, np.float16)
    args = [pointer(nothing)] * 4
    assert device.multiply(*args, 4, 8, 28672, 1, 229504) == 1


PRODUCTS = [
    # rows, n, k, blocks of the device
    (3, 72, 136, 2),
    (5, 64, 64, 2),
    (5, 200, 136, 6),
    (37, 264, 72, 2),
    (64, 96, 200, 6),
    (65, 264, 72, 2),
    (129, 256, 72, 2),
    (256, 264, 64, 2),
    (300, 136, 512, 6),
    (200, 776, 72, 2),
    (520, 72, 64, 2),
    (5, 72, 1032, 6),
    (100, 136, 1024, 8),
    (200, 136, 1032, 10),
]


def test_every_shape_of_a_tile_is_tested(device: Any) -> None:
    assert {device.chosen(*of) for of in PRODUCTS if of[0] > 4} == set(range(6))


@pytest.mark.parametrize(("rows", "n", "k", "blocks"), PRODUCTS)
def test_products(device: Any, rows: int, n: int, k: int, blocks: int) -> None:
    a, b, residual = exact((rows, k), 1), exact((n, k), 2), exact((rows, n), 3)
    bias, out = exact((n,), 4), np.full((rows, n), np.nan, np.float16)
    done = device.product(
        pointer(a), pointer(b), pointer(bias), pointer(residual), pointer(out), rows, n, k, blocks
    )
    assert done == 0
    wide = a.astype(np.float64) @ b.astype(np.float64).T + bias + residual
    assert np.array_equal(out, wide.astype(np.float16))


@pytest.mark.parametrize("width", [96, 1000, 4096, 7168])
def test_norm(device: Any, width: int) -> None:
    x = (drawn((5, width), 1, 3.0) + np.float16(2)).astype(np.float16)
    weight, bias, out = (
        drawn((width,), 2),
        drawn((width,), 3),
        np.full((5, width), np.nan, np.float16),
    )
    assert device.normalise(*map(pointer, (x, weight, bias, out)), 5, width) == 0
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = centred * scale * weight.astype(np.float64) + bias.astype(np.float64)
    # A thread sums a share of a row, then few shares are joined (Higham, (3.5)): mean, variance and
    # root are off by that, and the result is rounded once.
    terms = (width // 32 + 24) * 2.0**-24
    reach = np.abs(centred) + np.abs(wide).mean(-1, keepdims=True)
    summed = terms / (1 - terms) * reach * scale * np.abs(weight.astype(np.float64))
    rounding = np.spacing((np.abs(expected) + summed).astype(np.float16)).astype(np.float64) / 2
    assert (np.abs(out.astype(np.float64) - expected) <= summed + rounding).all()


CASES = [
    # dim, heads, key heads, batch, past, new, padding on the left
    (128, 2, 2, 1, (37,), 1, (0,)),
    (64, 4, 2, 2, (300, 5), 1, (0, 3)),
    (80, 2, 1, 1, (16,), 1, (0,)),
    (112, 1, 1, 1, (1023,), 1, (0,)),
    (128, 1, 1, 1, (0,), 9, (0,)),
    (72, 2, 2, 2, (15, 40), 6, (2, 41)),
    (8, 2, 2, 1, (0,), 40, (5,)),
    (256, 1, 1, 1, (33,), 3, (0,)),
]


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "batch", "past", "new", "starts"), CASES)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_over_a_past(
    device: Any, dim: int, heads: int, kv_heads: int, batch: int, past: tuple[int, ...], new: int,
    starts: tuple[int, ...], fused: bool,
) -> None:  # fmt: skip
    d, kv = heads * dim, kv_heads * dim
    panels = (max(past) + new + PANEL - 1) // PANEL
    held_k, held_v = (drawn((batch, kv_heads, panels * PANEL, dim), s) for s in (1, 2))
    if fused:
        q = k = v = drawn((batch, new, d + 2 * kv), 3)
        columns = (0, d, d + kv)
    else:
        q, k, v = (drawn((batch, new, w), s) for s, w in ((3, d), (4, kv), (5, kv)))
        columns = (0, 0, 0)
    layout = np.array([q.shape[-1], k.shape[-1], v.shape[-1], *columns], np.int32)
    slopes = np.exp2(-np.arange(1, heads + 1)).astype(np.float32)
    lengths, begins = np.array(past, np.int32), np.array(starts, np.int32)
    # What lies beyond the past is not to be looked at.
    for n, length in enumerate(past):
        held_k[n, :, length:], held_v[n, :, length:] = np.nan, np.nan
    keys = np.ascontiguousarray(
        held_k.reshape(batch, kv_heads, panels, PANEL, dim).swapaxes(-1, -2)
    )
    values = held_v.copy()
    out = np.full((batch, new, heads, dim), np.nan, np.float16)
    scale = 0.7 * dim**-0.5
    done = device.attend(
        pointer(q), pointer(k), pointer(v), pointer(layout), pointer(keys), pointer(values),
        pointer(slopes), pointer(lengths), pointer(begins), pointer(out), batch, new, panels,
        heads, kv_heads, dim, ctypes.c_float(scale),
    )  # fmt: skip
    assert done == 0

    def fresh(x: np.ndarray, column: int, count: int) -> np.ndarray:
        part = x[..., column : column + count * dim]
        return part.reshape(batch, new, count, dim).swapaxes(1, 2)

    for n, length in enumerate(past):
        held_k[n, :, length : length + new] = fresh(k, columns[1], kv_heads)[n]
        held_v[n, :, length : length + new] = fresh(v, columns[2], kv_heads)[n]
    stored = keys.swapaxes(-1, -2).reshape(held_k.shape)
    for n, length in enumerate(past):
        assert np.array_equal(stored[n, :, : length + new], held_k[n, :, : length + new])
        assert np.array_equal(values[n, :, : length + new], held_v[n, :, : length + new])
    queries = fresh(q, columns[0], heads).astype(np.float64)
    for n, length in enumerate(past):
        for h in range(heads):
            group = h // (heads // kv_heads)
            for i in range(new):
                seen = slice(starts[n], length + i + 1)
                if seen.start >= seen.stop:
                    assert not out[n, i, h].any()
                    continue
                s = held_k[n, group, seen].astype(np.float64) @ queries[n, h, i] * scale
                s += slopes[h] * (np.arange(seen.start, seen.stop) - length - i)
                p = np.exp(s - s.max())
                want = p @ held_v[n, group, seen].astype(np.float64) / p.sum()
                np.testing.assert_allclose(
                    out[n, i, h].astype(np.float64), want, rtol=2**-10, atol=2**-12
                )
