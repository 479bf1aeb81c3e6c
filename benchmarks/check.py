"""How long a check takes on the shipped checkpoint, and what of it is compilation.

    python benchmarks/check.py [--rounds 3] [--max-tokens 32] [--gigabytes 0.5] [--output FILE]

A table in Markdown. For every storage dtype: seconds to compile the port for this machine into an
empty cache, seconds to find it there, and milliseconds of one check, from the start of a process to
its verdict and within a process that has checked before. Medians. Below it what
`benchmarks/convert.py` says of converting a checkpoint beside `cp`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.environment import environment
from harness.pipeline import SHIPPED, Request, check

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float16", "bfloat16", "float32")
COMPILE = """
import json, sys, time
from relax_impl.compile import compile_model
from relax_impl.config import MPTConfig
config = MPTConfig.from_dict(json.load(open(sys.argv[1])))
start = time.perf_counter()
library = compile_model(config, sys.argv[2])
print(library.cached, time.perf_counter() - start)
"""
PROCESS = "import sys; from harness.cli import main; sys.argv[0] = 'mpt-conform'; main()"


def python(cache: Path, program: str, *arguments: str) -> str:
    variables = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=variables, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_seconds(cache: Path, dtype: str, *, cached: bool) -> float:
    found, seconds = python(cache, COMPILE, str(SHIPPED / "config.json"), dtype).split()
    if found != str(cached):
        sys.exit(f"{dtype}: expected cached={cached}, found {found}")
    return float(seconds)


def seconds(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def in_process(dtype: str, max_tokens: int) -> int:
    report = check(Request(dtype=dtype, max_tokens=max_tokens))
    if report.verdict != "conforms":
        sys.exit(f"{dtype}: {report.verdict} {report.reason} {report.first_divergence}")
    return sum(row.positions for row in report.logits)


def row(dtype: str, rounds: int, max_tokens: int) -> str:
    with tempfile.TemporaryDirectory() as made:
        cache = Path(made)
        cold = compile_seconds(cache, dtype, cached=False)
        warm = statistics.median(compile_seconds(cache, dtype, cached=True) for _ in range(rounds))
        arguments = ("check", "--dtype", dtype, "--max-tokens", str(max_tokens))
        whole = seconds(lambda: python(cache, PROCESS, *arguments), rounds)
        os.environ["XDG_CACHE_HOME"] = made
        in_process(dtype, max_tokens)  # imports, and loads the library
        inside = seconds(lambda: in_process(dtype, max_tokens), rounds)
    return f"| {dtype} | {cold:.2f} | {warm:.2f} | {whole * 1e3:.0f} | {inside * 1e3:.0f} |"


def conversion(gigabytes: float) -> str:
    script = ROOT / "benchmarks" / "convert.py"
    if not script.exists():
        return "benchmarks/convert.py is not here: nothing measured.\n"
    command = [sys.executable, str(script), "--gigabytes", str(gigabytes), "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"benchmarks/convert.py: exit code {done.returncode}\n{done.stderr}")
    return f"```text\n{done.stdout}```\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32, help="of every prompt")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="to convert")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "check.md")
    options = parser.parse_args()
    here = environment()
    rows = [row(dtype, options.rounds, options.max_tokens) for dtype in DTYPES]
    positions = in_process("float16", options.max_tokens)
    text = f"""# A check of the shipped checkpoint

{here["cpu"]}, {os.cpu_count()} cores, {here["threads"]} thread(s), load {os.getloadavg()[0]:.1f};
Python {platform.python_version()}, TVM {here["apache-tvm"]}, torch {here["torch"]}.
Every default prompt, at most {options.max_tokens} tokens each: {positions} positions, relax on
llvm; median of {options.rounds} rounds.

| dtype | compile, empty cache (s) | compile, cached (s) | check, new process (ms) | check (ms) |
|---|---|---|---|---|
{os.linesep.join(rows)}

## Conversion to float16 beside `cp`

{conversion(options.gigabytes)}
Made by `python benchmarks/check.py`.
"""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
