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

    print(f"{options.rows} x {options.columns} float16 logits, one core, processor time")
    print(f"million elements a second of all {ORDERS + 1} tensors of a tap in brackets")
    every = [observed, *orders]
    for name, tensors, times, run in (
        ("first look, rounding alone", 1, 3, lambda: look(golden, [observed], "float16")),
        ("first look, accumulation too", 1, 3, lambda: look(golden, [observed], "float16", joined)),
        ("first look, orders too", ORDERS + 1, 3, lambda: look(golden, every, "float16", joined)),
        ("exact statistics", 1, 1, exact),
        ("a tap, proved by a first look", ORDERS + 1, 1, lambda: tap(proved)),
        ("a tap, exact", ORDERS + 1, 1, lambda: tap(None)),
    ):
        took = seconds(run, min(times, options.times))
        print(f"{name:32} {size / took / 1e6:8.1f} ({tensors * size / took / 1e6:8.1f})")
    assert proved(tap(proved)), "the example is healthy"
    found = look(golden, [observed], "float16").screens[0]
    print("statistic, value, bound on its error")
    for name in STATISTICS:
        print(f"  {name:12} {found.statistics.get(name):10.4g} {found.slack[name]:10.2g}")


if __name__ == "__main__":
    main()
