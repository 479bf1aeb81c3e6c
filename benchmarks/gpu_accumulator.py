"""How a GPU's matrix unit adds: which imitation gives the bits of the port's own products.

    python benchmarks/gpu_accumulator.py [--output FILE.json]

The products of `relax_impl/kernels/cuda/gemm.py` run with float32 results on random operands and on
ones whose exponents lie far apart, and are imitated bit by bit. An imitation takes `terms` products
and what is held so far, cuts each towards zero `bits` binary places below the largest exponent
among them (or not at all), adds these exactly, and cuts or rounds the sum to float32's 24 bits. The
exponent of a product is the sum of its factors' (``raw``), or its own (``normalised``).

Where k is halved between two blocks (see ``tiles.cuh``), the halves are added in float32,
rounded to nearest. Last comes the order of the reference that a subject declares by
``accumulator="float32_cut"``: how many of its sums have the same bits, and how far both come out
too small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Array = np.ndarray[Any, Any]
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SMALLEST_EXPONENT = {"float16": -14, "bfloat16": -126}
TILE_K, HALVED_FROM = 64, 1024
"""The k of a step, and from where it is halved: as in ``tiles.cuh``."""


class Unit(NamedTuple):
    """An imitation: see above; `bits` None cuts no addend, `last` is ``cut`` or ``round``."""

    terms: int
    bits: int | None
    last: str
    exponents: str


UNITS = [
    Unit(*of)
    for of in itertools.product(
        (4, 8, 16, 32), (22, 23, 24, 25, 26, 27, None), ("cut", "round"), ("raw", "normalised")
    )
    if of[1] is not None or of[3] == "raw"
]


def exponent(x: Array, smallest: int) -> Array:
    """Floor of log2 |x|; of zero, less than anything."""
    found = np.frexp(x)[1] - 1
    return np.where(x == 0, -(10**4), np.maximum(found, smallest))


def to_float32(x: Array, last: str) -> Array:
    """Cut or round float64 to float32, as float64."""
    if last == "round":
        return x.astype(np.float32).astype(np.float64)
    return (x.view(np.int64) & -(1 << 29)).view(np.float64)


def imitated(a: Array, b: Array, unit: Unit, smallest: int) -> Array:
    """Sum products of a (m, k) and b (n, k), float64, as a unit does; float64 (m, n)."""
    total = np.zeros((len(a), len(b)))
    lowest = 2 * smallest
    for start in range(0, a.shape[1], unit.terms):
        x, y = a[:, None, start : start + unit.terms], b[None, :, start : start + unit.terms]
        addends = np.concatenate([x * y, total[..., None]], axis=-1)
        if unit.bits is not None:
            if unit.exponents == "raw":
                places = exponent(x, smallest) + exponent(y, smallest)
            else:
                places = exponent(x * y, lowest)
            held = exponent(total, -126)[..., None]
            largest = np.concatenate([places, held], axis=-1).max(axis=-1, keepdims=True)
            quantum = np.ldexp(1.0, np.maximum(largest, -400) - unit.bits)
            addends = np.trunc(addends / quantum) * quantum
        total = to_float32(addends.sum(axis=-1), unit.last)
    return total


def operands(kind: str, m: int, n: int, k: int, dtype: str) -> tuple[Array, Array]:
    random = np.random.default_rng([m, n, k])
    pair = []
    for rows in (m, n):
        values = random.standard_normal((rows, k))
        if kind == "far apart":
            values *= np.exp2(random.integers(-6, 7, (rows, k)))
        pair.append(values.astype(NUMPY[dtype]))
    return pair[0], pair[1]


def on_device(a: Array, b: Array, dtype: str) -> Array:
    """Multiply by the port's kernel, float32 results."""
    import tvm

    from relax_impl.kernels.cuda.gemm import Gemm
    from relax_impl.kernels.cuda.library import wgmma_target
    from relax_impl.target import resolve

    kernel = Gemm(len(b), a.shape[1], dtype, "float32")
    module = tvm.IRModule({"kernel": kernel("kernel")})
    built = tvm.compile(module, target=wgmma_target(resolve("cuda")), tir_pipeline="tirx")
    device = tvm.cuda(0)
    x, weight = (tvm.runtime.tensor(np.ascontiguousarray(t), device) for t in (a[None], b))
    out = tvm.runtime.tensor(np.full((1, len(a), len(b)), np.nan, np.float32), device)
    built["kernel"](x, weight, weight, x, out)
    return out.numpy()[0].astype(np.float64)


def parts(k: int) -> list[slice]:
    """Return the parts of k that blocks sum up by themselves, where there are few tiles."""
    steps = -(-k // TILE_K)
    if k < HALVED_FROM:
        return [slice(0, k)]
    middle = (steps + 1) // 2 * TILE_K
    return [slice(0, middle), slice(middle, k)]


def declared(a: Array, b: Array) -> Array:
    """The sum in the order that ``float32_cut`` declares, in the same parts."""
    import torch

    from reference.arithmetic import product
    from reference.orders import Order

    order = Order("cut", accumulator="float32_cut")
    x, y = (torch.from_numpy(t.astype(np.float32)) for t in (a, b))
    return product(x, y.T, order).numpy().astype(np.float64)


def gain(found: Array, exact: Array) -> float:
    return float((found * exact).sum() / np.square(exact).sum() - 1)


def joined(pieces: list[Array]) -> Array:
    total = pieces[0]
    for piece in pieces[1:]:
        total = (total + piece).astype(np.float32).astype(np.float64)
    return total


CRAFTED = {
    # One term of 2^24 and others, by place: what the sum of 32 is tells units apart.
    "2^24, then 1.75 in the next group of 16": {0: 4096.0, 16: 1.75},
    "2^24 with 1.75 beside it": {0: 4096.0, 1: 1.75},
    "2^24 with 0.5 four times beside it": {0: 4096.0, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5},
    "2^24 with 0.5 four times, from place 8": {0: 4096.0, 8: 0.5, 9: 0.5, 10: 0.5, 11: 0.5},
    "2^24 with 0.25 eight times beside it": {0: 4096.0} | dict.fromkeys(range(1, 9), 0.25),
    "2^24, then -0.25 in the next group of 16": {0: 4096.0, 16: -0.25},
    "2^24, then 0.5 four times in the next": {0: 4096.0, 16: 0.5, 17: 0.5, 18: 0.5, 19: 0.5},
}


def crafted() -> dict[str, float]:
    """Return what the device makes of sums whose exact result says how they were added."""
    a, b = np.zeros((8, 64), np.float16), np.ones((8, 64), np.float16)
    b[:, 0] = 4096
    for row, terms in enumerate(CRAFTED.values()):
        for at, value in terms.items():
            a[row, at] = value
    found = on_device(a, b, "float16")
    return {name: found[row, 0] - 2**24 for row, name in enumerate(CRAFTED)}


def measure() -> dict[str, Any]:
    """Run all; returns the record."""
    from gpu import environment

    result: dict[str, Any] = {"environment": environment(), "sum - 2^24": crafted()}
    for name, value in result["sum - 2^24"].items():
        print(f"{name}: 2^24 {value:+g}")
    for dtype, kind, m, n, k in [
        ("float16", "normal", 16, 64, 960),
        ("float16", "far apart", 16, 64, 960),
        ("float16", "normal", 16, 64, 4096),
        ("float16", "normal", 144, 16, 4096),
        ("bfloat16", "far apart", 16, 64, 960),
    ]:
        a, b = operands(kind, m, n, k, dtype)
        found = on_device(a, b, dtype)
        wide, other = a.astype(np.float64), b.astype(np.float64)
        some, smallest = parts(k), SMALLEST_EXPONENT[dtype]
        asked = UNITS if k < HALVED_FROM else [u for u in UNITS if u.terms == 16]
        same = {
            unit: float(
                (
                    joined([imitated(wide[:, p], other[:, p], unit, smallest) for p in some])
                    == found
                ).mean()
            )
            for unit in asked
        }
        best = sorted(same.items(), key=lambda item: -item[1])
        exact = wide @ other.T
        order = joined([declared(a[:, p], b[:, p]) for p in some])
        one = {
            "same bits": [{**unit._asdict(), "share": share} for unit, share in best[:12]],
            "order float32_cut, same bits": float((order == found).mean()),
            "gain - 1, device": gain(found, exact),
            "gain - 1, order float32_cut": gain(order, exact),
            "gain - 1, rounded to nearest": gain(exact.astype(np.float32).astype(float), exact),
        }
        name = f"{dtype}, {kind}, {m} x {n} sums of {k} in {len(some)} part(s)"
        result[name] = one
        print(f"\n{name}")
        for unit, share in best[:5]:
            print(f"  {100 * share:6.2f} % {unit}")
        print(f"  order float32_cut: {100 * one['order float32_cut, same bits']:.2f} % same bits; "
              f"gain - 1: {one['gain - 1, order float32_cut']:.3e}, on the device "
              f"{one['gain - 1, device']:.3e}", flush=True)  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure()
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
