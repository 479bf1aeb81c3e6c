"""What a check says beforehand, against what it then takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.forecast import size
from harness.measure.clock import Clock, spoken

# Peak memory of a fresh process that checks one prompt of 192 random ids on a model whose weights
# and taps outweigh the imports, with the forecast and the peak before the walk.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from cases.synthetic import make_checkpoint
from harness import forecast, pipeline
from harness.measure.run import Walk

folder = Path(sys.argv[1])
config = dict(model_type="mpt", d_model=512, n_heads=4, n_layers=1, max_seq_len=192,
              vocab_size=int(sys.argv[2]), no_bias=True, attn_config={"alibi": True})
make_checkpoint(folder / "model", config, seed=0, dtype="bfloat16")
np.save(folder / "ids.npy", np.arange(192)[None] % 97)
def peak():
    # Of this program alone: the peak that getrusage tells is inherited from whoever started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
said, before = [], []
def memory(*given):
    said.append(plain(*given))
    before.append(peak())
    return said[-1]
plain, forecast.memory = forecast.memory, memory
request = pipeline.Request(folder / "model", subject="torch", prompts=str(folder / "ids.npy"))
assert pipeline.check(request).verdict == "conforms"
print(said[-1], peak() - before[-1])
"""


@pytest.mark.parametrize("vocabulary", [128, 12_000])
def test_memory_is_forecast(tmp_path, vocabulary: int) -> None:  # type: ignore[no-untyped-def]
    """An upper bound within a factor of four: allocators reuse what is free."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(vocabulary)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, took = map(int, done.stdout.split()[-2:])
    assert took <= said <= 4 * took


def test_the_time_left_is_what_the_layers_so_far_took() -> None:
    told: list[str] = []
    times = iter([100.0, 110.0, 120.0])
    clock = Clock(3, told.append, lambda: next(times))
    for layer in range(3):
        clock.layer(layer)
    assert told == [
        "layer 1 of 3",
        "layer 2 of 3, about 30 s left",
        "layer 3 of 3, about 20 s left",
    ]


def test_numbers_are_spoken() -> None:
    assert [spoken(s) for s in (7.6, 180.0, 9000.0)] == ["8 s", "3 min", "2.5 h"]
    assert [size(b) for b in (12_000_000, 53_000_000_000)] == ["12 MB", "53.0 GB"]
