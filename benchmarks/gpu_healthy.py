"""A healthy port on a CUDA device, judged over and over: false alarms, and differences of runs.

    python benchmarks/gpu_healthy.py [--runs 50] [--dtype float16] [--output FILE.json]

One process compiles and loads the port on the shipped checkpoint once. Every run is a whole check
(all taps, the paths over the cache, ALiBi, tensors) on prompts of its own: two of random ids, of
lengths drawn from 1 to 257, one of them a multiple of 64 now and then, and held-out text. Beside it
the same prompt, one for all runs, goes through the deployed forward and through a prefill with
decode steps each time; their logits are held against those of the first run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.environment import environment  # noqa: E402
from harness.inputs import load_cases  # noqa: E402
from harness.pipeline import SHIPPED, Request, check, open_material  # noqa: E402
from harness.report.files import write_whole  # noqa: E402
from harness.subjects.relax import load  # noqa: E402

LONGEST = 257
FIXED, STEPS = 200, 8
"""Tokens of the prompt that every run repeats, the last of them one by one."""


def prompts(folder: Path, run: int, vocabulary: int) -> Path:
    """Write two prompts of random ids, which hang on the number of the run alone."""
    folder.mkdir()
    rng = np.random.default_rng([run, 50])
    for index in range(2):
        length = int(rng.integers(1, LONGEST + 1))
        if rng.random() < 0.25:
            length = max(64, length // 64 * 64)
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        np.save(folder / f"random-{index}.npy", ids)
    return folder


def repeated(subject: Any, ids: Any) -> dict[str, Any]:
    """Return the logits of one prompt by both ways of a deployment."""
    whole = np.array(subject.forward(ids))
    first, state = subject.prefill(ids[:, :-STEPS])
    steps = [subject.decode(state, ids[:, at]) for at in range(ids.shape[1] - STEPS, ids.shape[1])]
    return {"forward": whole, "prefill": np.array(first), "decode": np.stack(steps, 1)}


def difference(first: Any, here: Any) -> dict[str, Any]:
    """Say how far two arrays lie apart."""
    apart = np.abs(first.astype(np.float64) - here.astype(np.float64))
    return {"elements": int(np.count_nonzero(apart)), "largest": float(apart.max())}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the checks; returns the record."""
    config = open_material(SHIPPED).config
    subject = load(SHIPPED, dtype=arguments.dtype, target=arguments.target)
    text = max(load_cases(None, config, SHIPPED, max_tokens=None), key=lambda c: c.ids.shape[1])
    ids = np.ascontiguousarray(text.ids[:1, :FIXED])
    first = repeated(subject, ids)
    runs: list[dict[str, Any]] = []
    for run in range(arguments.runs):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            place = prompts(Path(folder) / "prompts", run, config.vocab_size)
            np.save(place / "text.npy", ids[0, : 1 + 37 * run % FIXED])
            request = Request(
                dtype=arguments.dtype, target=arguments.target, prompts=str(place), diagnose=False
            )
            report = check(request, given=subject)
        closest = max(report.taps, key=lambda tap: tap.ratio or 0.0)
        again = {name: difference(first[name], now) for name, now in repeated(subject, ids).items()}
        one: dict[str, Any] = {"verdict": report.verdict, "reason": report.reason}
        one["closest"] = {"tap": closest.tap, "mode": closest.mode, "of limit": closest.ratio}
        one["taps"] = f"{report.compared['taps'].compared}/{report.compared['taps'].expected}"
        one["positions"] = report.compared["positions"].compared
        one["differs from the first run"] = again
        one["seconds"] = round(time.perf_counter() - started, 1)
        runs.append(one)
        where = report.first_divergence
        print(f"{run:3} {report.verdict}, {one['seconds']} s, closest {closest.tap} "
              f"{closest.ratio:.2f}, differs {[d['elements'] for d in again.values()]}"
              f"{'' if where is None else ' at ' + where.tap}", flush=True)  # fmt: skip
        result = summary(arguments, subject, runs)
        if arguments.output:
            write_whole(arguments.output, json.dumps(result, indent=1).encode() + b"\n")
    return result


def summary(
    arguments: argparse.Namespace, subject: Any, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Put the runs together."""
    apart = [one["differs from the first run"] for one in runs]
    return {
        "subject": f"{subject.name} {arguments.dtype}",
        "environment": environment(),
        "runs": len(runs),
        "alarms": sum(one["verdict"] != "conforms" for one in runs),
        "positions": sum(one["positions"] for one in runs),
        "largest share of a limit": max(one["closest"]["of limit"] or 0.0 for one in runs),
        "elements that differ from the first run, at most": {
            name: max(one[name]["elements"] for one in apart) for name in apart[0]
        },
        "every run": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--target", default="cuda", choices=["cuda", "llvm"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs: expected at least 1")
    result = measure(arguments)
    print(json.dumps({k: v for k, v in result.items() if k != "every run"}, indent=1))
    raise SystemExit(1 if result["alarms"] else 0)


if __name__ == "__main__":
    main()
