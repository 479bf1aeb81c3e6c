"""How fast bfloat16 checkpoints convert to float16, beside `cp` on the same files.

    python benchmarks/convert.py [--gigabytes 1.5] [--rounds 5] [--directory DIR]

Makes a bfloat16 checkpoint (normal weights of standard deviation 0.02, tensors of 128 MiB), then
alternates `cp -r` and `convert` on it. Both end with an fsync of every file they wrote, both write
as many bytes as they read, and what they wrote is removed before the next. Warm: the source has
just been read. Cold: the source's pages were dropped from the page cache with
posix_fadvise(POSIX_FADV_DONTNEED); below a virtual disk its host may still hold them. The ratio is
taken within each round, for the load of the machine changes between rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.checkpoint import TensorInfo
from harness.checkpoint.float16 import convert
from harness.checkpoint.writer import write_safetensors_shards


def make(directory: Path, gigabytes: float) -> int:
    directory.mkdir()
    (directory / "config.json").write_text('{"torch_dtype": "bfloat16"}\n')
    normal = np.random.default_rng(0).standard_normal((2**14, 2**12), dtype=np.float32)
    weights = (normal * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    number = max(1, round(gigabytes * 1e9 / weights.nbytes))
    names = [TensorInfo(f"w{i}", weights.shape, "bfloat16", "") for i in range(number)]
    write_safetensors_shards(directory, names, lambda _: weights, max_shard_bytes=10**10)
    return number * weights.nbytes


def warm(source: Path) -> None:
    for path in source.iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def cold(source: Path) -> None:
    for path in source.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a dirty page would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def to_float16(source: Path, target: Path) -> None:
    convert(source, target=target)


def timed(work: Callable[[Path, Path], None], source: Path, target: Path) -> float:
    start = time.perf_counter()
    work(source, target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    os.sync()  # what is left of this run is not charged to the next
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        source, target = Path(made, "source"), Path(made, "target")
        size = make(source, options.gigabytes)
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for work in (copy, to_float16):
            timed(work, source, target)  # the first writes pay for memory, not for work
        for state, prepare in (("warm", warm), ("cold", cold)):
            ratios = []
            for number in range(options.rounds):
                seconds = {}
                # Each goes first in every other round.
                for work in (copy, to_float16)[:: 1 if number % 2 == 0 else -1]:
                    prepare(source)
                    seconds[work] = timed(work, source, target)
                ratios.append(seconds[copy] / seconds[to_float16])
                print(
                    f"{state}: cp {size / seconds[copy] / 1e9:5.2f} GB/s   "
                    f"convert {size / seconds[to_float16] / 1e9:5.2f} GB/s   "
                    f"ratio {ratios[-1]:.2f}   load {os.getloadavg()[0]:.1f}"
                )
            print(
                f"{state}: median ratio {statistics.median(ratios):.2f} "
                f"(of {options.rounds}: {min(ratios):.2f} to {max(ratios):.2f})"
            )
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(f"peak memory {usage.ru_maxrss / 1e6:.2f} GB, making the checkpoint included")


if __name__ == "__main__":
    main()
