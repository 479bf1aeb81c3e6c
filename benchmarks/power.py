"""Where does detection end? The power curve of every mechanism of fault.

    python benchmarks/power.py [--dtype float16] [--strengths 10] [--output FILE] [MECHANISM ...]

Random strengths, log-uniform from 1e-5 to 1, are planted into the port on the shipped checkpoint
and checked by the taps alone: that a tensor did not arrive (its bits differ) is not counted, for
there any strength is seen. The table says between which two strengths detection begins.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from harness.certify.observe import remember
from harness.certify.planting import prompt
from harness.faults.model import Planted
from harness.faults.strength import MECHANISMS, Mechanism
from harness.pipeline import SHIPPED, Request, check
from harness.subjects.relax import RelaxSubject

WEAKEST = 1e-5


@dataclass(frozen=True)
class Trial:
    """One strength."""

    strength: float
    caught: bool
    place: str


def strengths(count: int, seed: int) -> list[float]:
    """Return random strengths, one in each of as many equal parts of the logarithmic range."""
    rng = np.random.default_rng(seed)
    exponent = (np.arange(count) + rng.random(count)) / count
    return [float(x) for x in WEAKEST ** (1.0 - exponent)]


def curve(name: str, dtype: str, count: int) -> tuple[str, list[Trial]]:
    """Check one mechanism at every strength."""
    remember()
    index, mechanism = next((i, m) for i, m in enumerate(MECHANISMS) if m.name == name)
    with tempfile.TemporaryDirectory() as folder:
        ids = str(prompt("trained", Path(folder)))
        return name, [trial(mechanism, s, dtype, ids) for s in strengths(count, index)]


def trial(mechanism: Mechanism, strength: float, dtype: str, ids: str) -> Trial:
    """Plant one strength and check."""
    planted = Planted(mechanism.at(strength))
    subject = RelaxSubject(SHIPPED, dtype, "llvm", planted)
    report = check(Request(prompts=ids, dtype=dtype, diagnose=False), given=subject)
    first = report.first_divergence
    return Trial(strength, first is not None, first.tap if first else "")


def row(mechanism: Mechanism, trials: list[Trial]) -> str:
    """Return the line of one mechanism."""
    missed = [t.strength for t in trials if not t.caught]
    caught = [t for t in trials if t.caught]
    everything = min((t.strength for t in caught if t.strength > max(missed, default=0)), default=1)
    expected = Planted(mechanism.at(1.0)).first_place
    placed = sum(t.place == expected for t in caught)
    smallest = min((t.strength for t in caught), default=float("nan"))
    return (
        f"| {mechanism.name} | {mechanism.summary} | {max(missed, default=0):.2g} | "
        f"{smallest:.2g} | {everything:.2g} | {placed} of {len(caught)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mechanisms", nargs="*", metavar="MECHANISM")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--strengths", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    chosen = [m for m in MECHANISMS if not options.mechanisms or m.name in options.mechanisms]
    if not chosen:
        parser.error(f"expected some of {', '.join(m.name for m in MECHANISMS)}")
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(curve, m.name, options.dtype, options.strengths) for m in chosen]
        curves = dict(future.result() for future in found)
    lines = "\n".join(row(m, curves[m.name]) for m in chosen)
    text = f"""# Where detection ends

{options.strengths} random strengths a mechanism, {options.dtype}, the shipped checkpoint, two rows
of 96 tokens; caught by a tap.

| mechanism | strength | largest missed | smallest caught | all caught from | first tap right |
|---|---|---|---|---|---|
{lines}

Made by `python benchmarks/power.py --dtype {options.dtype} --strengths {options.strengths}`.
"""
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
