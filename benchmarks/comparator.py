"""How many float16 logits a second does the comparator see, on one core?

    python benchmarks/comparator.py [--rows ROWS] [--columns COLUMNS] [--output FILE]

Compared are the first look, which proves conformance in float32 with a bound on its own error, and
the exact statistics in float64, which are computed when something comes close to its limit. Beside
them what others call a comparison, one bound on every element.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

# One core: every library that would start threads is told so before it is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from harness.judge.factors import shipped
from harness.judge.verdict import judge
from harness.measure.compare import Proof, measure_tap
from harness.measure.fast import look
from harness.measure.records import Measurement
from harness.measure.statistics import STATISTICS, accumulation, noise_scale, statistics
from harness.measure.taps import Place

ORDERS = 5


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the processor time of the quickest of several runs: others use the machine too."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return min(spent)


def proved(bounds: Measurement) -> bool:
    """Return whether bounds are enough for the verdict that ships."""
    return not judge(bounds, "float16", shipped()).diverges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=50432)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Write the table there too, as Markdown.")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    size = options.rows * options.columns
    golden = rng.normal(size=(options.rows, options.columns))

    def evaluated() -> np.ndarray:
        """Return the golden with a little error, rounded to storage."""
        return (golden + 1e-4 * rng.normal(size=golden.shape)).astype(np.float16)

    observed = evaluated()
    orders = [evaluated().astype(np.float32) for _ in range(ORDERS)]
    joined = accumulation(golden, orders, "float16")

    def tap(proof: Proof | None) -> Measurement:
        return measure_tap(
            "deployed", Place(None, "logits"), "p", observed, golden, orders, "float16",
            proved=proof,
        )  # fmt: skip

    def exact() -> object:
        noise = noise_scale(golden, [], "float16")
        return statistics(observed.astype(np.float64), golden, noise)

    def close() -> object:
        expected = torch.from_numpy(golden).half()
        return torch.allclose(torch.from_numpy(observed), expected, rtol=1e-3, atol=1e-5)

    every = [observed, *orders]
    rows = []
    for name, tensors, run in (
        ("first look, the subject alone", 1, lambda: look(golden, [observed], "float16")),
        ("first look, with accumulation", 1, lambda: look(golden, [observed], "float16", joined)),
        ("first look, orders too", ORDERS + 1, lambda: look(golden, every, "float16", joined)),
        ("a whole tap, proved by a first look", ORDERS + 1, lambda: tap(proved)),
        ("exact statistics, the subject alone", 1, exact),
        ("a whole tap, exact", ORDERS + 1, lambda: tap(None)),
        ("`numpy.allclose`", 1, lambda: np.allclose(observed, golden, rtol=1e-3, atol=1e-5)),
        ("`torch.allclose` in float16", 1, close),
    ):
        speed = size / seconds(run, options.times) / 1e6
        rows.append(f"| {name} | {tensors} | {speed:.1f} | {tensors * speed:.1f} |")
    assert proved(tap(proved)), "the example is healthy"
    found = look(golden, [observed], "float16").screens[0]
    bounds = [
        f"| {name} | {found.statistics.get(name):.4g} | {found.slack[name]:.2g} |"
        for name in STATISTICS
    ]
    table = "\n".join(rows)
    slack = "\n".join(bounds)
    text = f"""# What a comparison costs

{options.rows} x {options.columns} float16 logits, one core, processor time, the quickest of
{options.times}; million elements of the subject a second, and of all tensors that are looked at.

| | tensors | of the subject | of all |
|---|---|---|---|
{table}

| statistic | its value in float32 | how far that may be off |
|---|---|---|
{slack}

Made by `python benchmarks/comparator.py`.
"""
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
