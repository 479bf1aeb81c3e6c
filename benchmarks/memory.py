"""How much memory a check takes of a model that is larger than the memory.

    python benchmarks/memory.py [--gigabytes 12] [--limit 6] [--kind as] [--tokens 8]

Makes a float16 checkpoint of that size (blocks of 4096 x 32 heads, as in a 7B model, and a
vocabulary of 50432) and checks it in a process whose address space (``as``, what ``ulimit -v``
sets) or data (``data``, ``ulimit -d``) is limited: everything that the process allocates or maps
counts towards the first. Two rows: as ``check`` chooses by itself, and with ``--no-stream``. The
peak is VmHWM and VmPeak of the process itself, from /proc/self/status at its end.

Every block is drawn like those of `cases.synthetic`, but cut from two blocks of random numbers, so
that making the model takes less time than checking it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases.hub_layout import write_checkpoint
from cases.synthetic import random_tensor
from cases.topology import tensor_shapes
from harness.environment import environment

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"as": resource.RLIMIT_AS, "data": resource.RLIMIT_DATA}
CHECK = """
import sys
from pathlib import Path
from harness.cli import main
sys.argv[0] = "mpt-conform"
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    peaks = {key: int(status.split(key + ":")[1].split()[0]) * 1024 for key in ("VmHWM", "VmPeak")}
    print("PEAK", peaks["VmHWM"], peaks["VmPeak"])
"""


def config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "mpt",
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": layers,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": 50432,
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8},
    }


def layers_of(gigabytes: float) -> int:
    one, two = (sum(map(prod, tensor_shapes(config(n)).values())) * 2 for n in (1, 2))
    return max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)


def make(folder: Path, layers: int) -> int:
    shapes = tensor_shapes(config(layers))
    drawn: dict[str, Any] = {}

    def read(name: str) -> Any:
        if ".blocks." not in name:
            return random_tensor(name, shapes[name], 0)
        layer, inner = name.split(".blocks.")[1].split(".", 1)
        source = f"transformer.blocks.{int(layer) % 2}.{inner}"
        if source not in drawn:
            drawn[source] = random_tensor(source, shapes[name], 0).astype(np.float16)
        # The same numbers in other places: no two layers are equal.
        return np.roll(drawn[source], 7 * (int(layer) // 2), axis=-1)

    write_checkpoint(
        folder, config(layers), shapes, read, dtype="float16", shards=layers, fmt="safetensors"
    )
    return sum(map(prod, shapes.values())) * 2


def limited(kind: str, limit: int) -> Callable[[], None]:
    def apply() -> None:
        resource.setrlimit(LIMITS[kind], (limit, limit))

    return apply


@dataclass(frozen=True)
class Run:
    code: int
    resident: int
    address_space: int
    said: str
    seconds: float

    def row(self, name: str, verdict: str) -> str:
        cells = f"{self.resident / 1e9:.2f} | {self.address_space / 1e9:.2f} | {self.seconds:.0f}"
        return f"| `{name}` | {self.code} | {verdict} | {cells} |"


def checked(folder: Path, kind: str, limit: int, *options: str) -> Run:
    started = time.perf_counter()
    command = [sys.executable, "-c", CHECK, "check", str(folder / "model"), *options]
    done = subprocess.run(
        [*command, "--prompts", str(folder / "ids.npy"), "--json", str(folder / "record.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=limited(kind, limit),
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    peaks = next((line for line in lines if line.startswith("PEAK")), "PEAK 0 0")
    said = [line for line in (*lines, *done.stderr.splitlines()) if line and line != peaks]
    resident, space = map(int, peaks.split()[1:])
    seconds = time.perf_counter() - started
    return Run(done.returncode, resident, space, "\n".join(said), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=12, help="of float16 weights")
    parser.add_argument("--limit", type=float, default=6, help="GB that the process may take")
    parser.add_argument("--kind", choices=sorted(LIMITS), default="as")
    parser.add_argument("--tokens", type=int, default=8, help="of the one prompt")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    default = ROOT / "benchmarks" / "results" / "memory.md"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    layers, limit = layers_of(options.gigabytes), round(options.limit * 1e9)
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        folder = Path(made)
        size = make(folder / "model", layers)
        ids = np.random.default_rng(0).integers(0, 50432, (1, options.tokens))
        np.save(folder / "ids.npy", ids)
        chosen = checked(folder, options.kind, limit)
        if chosen.code != 0:
            sys.exit(f"exit code {chosen.code}\n{chosen.said}")
        record = json.loads((folder / "record.json").read_text())
        whole = checked(folder, options.kind, limit, "--no-stream")
    here = environment()
    axes = ", ".join(
        f"{name} {axis['compared']}/{axis['expected']}" for name, axis in record["compared"].items()
    )
    ends = whole.said.splitlines()[-1].replace(made, "DIR") if whole.said else "nothing"
    text = f"""# A model larger than the memory

{here["cpu"]}, {here["threads"]} thread(s), load {os.getloadavg()[0]:.1f}; Python {here["python"]},
TVM {here["apache-tvm"]}, torch {here["torch"]}. {size / 1e9:.2f} GB of float16 weights ({layers}
blocks of d_model 4096, vocabulary 50432), {options.tokens} tokens; the process may take
{limit / 1e9:.2f} GB (`ulimit {"-v" if options.kind == "as" else "-d"}`).

| | exit code | verdict | peak resident (GB) | peak address space (GB) | seconds |
|---|---|---|---|---|---|
{chosen.row("check", record["verdict"])}
{whole.row("check --no-stream", "none")}

Compared: {axes}.
{" ".join(record["checkpoint"]["notes"])}.

`--no-stream` ends with: `{ends}`

Made by `python benchmarks/memory.py --gigabytes {options.gigabytes:g} --limit {options.limit:g}
--kind {options.kind} --tokens {options.tokens}`.
"""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
