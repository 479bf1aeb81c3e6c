"""How many float16 logits a second does the comparator see, on one core?

    python benchmarks/comparator.py [--rows ROWS] [--columns COLUMNS]

Compared are the first look, which proves conformance in float32 with a bound on its own error, and
the exact statistics in float64, which are computed when something comes close to its limit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

# One core: every library that would start threads is told so before it is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from harness.measure.fast import screen
from harness.measure.statistics import STATISTICS, noise_scale, statistics


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the processor time of the quickest of several runs: others use the machine too."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=50432)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    size = options.rows * options.columns
    golden = rng.normal(size=(options.rows, options.columns)).astype(np.float32)
    observed = golden.astype(np.float16)
    wide = golden.astype(np.float64)
    share = (np.full(options.rows, 1e-7), np.ones(options.columns))
    print(f"{options.rows} x {options.columns} float16 logits, one core, processor time")
    for name, run in (
        ("first look, rounding alone", lambda: screen(observed, golden, "float16")),
        ("first look, with accumulation", lambda: screen(observed, golden, "float16", [share])),
        (
            "exact statistics",
            lambda: statistics(observed.astype(np.float64), wide, noise_scale(wide, [], "float16")),
        ),
    ):
        times = options.times if name.startswith("first") else 1
        print(f"{name:32} {size / seconds(run, times) / 1e6:8.1f} million elements/s")
    found = screen(observed, golden, "float16")
    print("statistic, value, bound on its error")
    for name in STATISTICS:
        print(f"  {name:12} {found.statistics.get(name):10.4g} {found.slack[name]:10.2g}")


if __name__ == "__main__":
    main()
