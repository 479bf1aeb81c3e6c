"""How many pairs of a config and an input the property suite judges in a time.

    python benchmarks/throughput.py [--minutes 5] [--workers 2] [--inputs 24] [--fault NAME]

The same strategy as in `tests/harness/test_check_generated.py`: Hypothesis makes configs of every
feature, each with random weights; the port is compiled for it and judged as `mpt-conform check`
judges, every tap of every layer, on the input that came with it and on `--inputs` more of any batch
and length. A case is a config with an input; equal ones count once. Workers are processes of one
thread each, begin with an empty compile cache, and stop after `--minutes`.

The levers: one compilation for all inputs of a config (`--inputs 0` shows what it costs without),
and statistics that look at a tap exactly only where a cheap bound does not prove that it conforms.
With `--fault` a mistake of the library is planted into every model: then the cases must diverge.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.environment import environment

ROOT = Path(__file__).resolve().parent.parent
CONFIGS_AT_A_TIME = 40


@dataclass
class Tally:
    cases: int = 0
    positions: int = 0
    compiling: float = 0.0
    checking: float = 0.0
    verdicts: dict[str, int] = field(default_factory=lambda: collections.Counter())
    unexpected: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)


def work(number: int, until: float, inputs: int, fault: str | None) -> Tally:
    """Judge generated cases until the time is over."""
    import numpy as np
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from cases.strategies import FEATURES, Case, checkpoint_cases, configs, varied_ids
    from harness.allocator import keep_freed_memory
    from harness.pipeline import Request, check
    from relax_impl.compile import compile_model
    from relax_impl.config import MPTConfig

    keep_freed_memory()
    tally = Tally()
    seen: set[str] = set()

    def judge(case: Case, folder: Path) -> None:
        prompts = folder / "prompts"
        prompts.mkdir()
        extra = varied_ids(case.config, case.seed, inputs) if inputs else ()
        every = tuple(dict.fromkeys((case.ids, *extra)))
        for index, ids in enumerate(every):
            np.save(prompts / f"{index:03}.npy", np.array(ids))
        checkpoint = case.write(folder / "checkpoint", "bfloat16")
        started = time.perf_counter()
        if fault is None:
            compile_model(MPTConfig.from_dict(case.config), "float16")
        tally.compiling += time.perf_counter() - started
        started = time.perf_counter()
        report = check(Request(checkpoint, prompts=str(prompts), fault=fault, diagnose=False))
        tally.checking += time.perf_counter() - started
        tally.verdicts[report.verdict] += 1
        expected = "conforms" if fault is None else "diverges"
        if report.verdict != expected:
            what = {"config": case.config, "seed": case.seed, "reason": report.reason}
            tally.unexpected.append(f"{report.verdict}: {json.dumps(what)}")
        judged = {row.case for row in report.logits}
        tally.cases += sum(name.removesuffix(".npy")[:3].isdigit() for name in judged)
        tally.positions += sum(row.positions for row in report.logits)
        tally.features |= {name for name, has in FEATURES.items() if has(case.config)}

    chosen = checkpoint_cases(
        configs(max_layers=2, max_width=48, max_seq_len=24).filter(
            lambda raw: raw["d_model"] > raw["n_heads"]
        )
    )
    start = number
    while time.time() < until:

        @seed(start)
        @settings(
            max_examples=CONFIGS_AT_A_TIME,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=chosen)
        def some(case: Case) -> None:
            key = json.dumps([case.config, case.seed])
            if time.time() < until and key not in seen:
                seen.add(key)
                with tempfile.TemporaryDirectory() as folder:
                    judge(case, Path(folder))

        some()
        start += 1000
    return tally


def _work(arguments: tuple[int, float, int, str | None, str]) -> Tally:
    number, until, inputs, fault, cache = arguments
    os.environ |= {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}
    return work(number, until, inputs, fault)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=24, help="of each config, beside its own")
    parser.add_argument("--fault", help="plant it: every case must diverge")
    default = ROOT / "benchmarks" / "results" / "throughput.md"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    started = time.time()
    until = started + 60 * options.minutes
    with tempfile.TemporaryDirectory() as cache:
        # Spawned: what a library learnt of its threads in this process is not inherited.
        os.environ |= {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            jobs = [
                (number, until, options.inputs, options.fault, cache)
                for number in range(options.workers)
            ]
            tallies = pool.map(_work, jobs)
    seconds = time.time() - started
    verdicts: collections.Counter[str] = collections.Counter()
    for tally in tallies:
        verdicts.update(tally.verdicts)
    cases, configs = sum(t.cases for t in tallies), sum(verdicts.values())
    features = set().union(*(t.features for t in tallies))
    here = environment()
    words = f" --fault {options.fault}" if options.fault else ""
    named = ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))
    positions = sum(tally.positions for tally in tallies)
    numbers = (cases, configs, positions, round(seconds), round(300 * cases / seconds))
    cells = (*map(str, numbers), named)
    text = f"""# Throughput of the property suite

{here["cpu"]}, {options.workers} processes of one thread, load {os.getloadavg()[0]:.1f}; Python
{here["python"]}, TVM {here["apache-tvm"]}, torch {here["torch"]}.

| cases | configs | positions | seconds | cases in 5 minutes | verdicts |
|---|---|---|---|---|---|
| {" | ".join(cells)} |

Of the processes' time {share(tallies, "compiling", seconds):.0f} % went into compiling and
{share(tallies, "checking", seconds):.0f} % into checking. The configs have {len(features)} of the
features that `cases.strategies` knows.

Made by `python benchmarks/throughput.py --minutes {options.minutes:g} --workers {options.workers}
--inputs {options.inputs}{words}`.
"""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)
    unexpected = [line for tally in tallies for line in tally.unexpected]
    for line in unexpected:
        print(line)
    if unexpected:
        sys.exit(1)


def share(tallies: list[Tally], name: str, seconds: float) -> float:
    return 100 * sum(getattr(tally, name) for tally in tallies) / (seconds * len(tallies))


if __name__ == "__main__":
    main()
