"""Prefill of the 7B shape at every length on a CUDA device: right, and without a cliff.

    python benchmarks/gpu_lengths.py [--layers 32] [--rounds 9] [--output FILE.json]

The prompts are the beginnings of one, so that float32 with the same weights, evaluated once, has
the logits of all: what stands behind a position does not change it. Every length from 1 to 300 and
those around 1024, 2048 and 4096 run through the deployed forward, one after another. Their time is
the median between events of the device, back to back; a cliff is the quotient of a time and of what
a straight line through the times of the neighbours gives, `NEAR` lengths before and behind.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from gpu import SHAPE, environment, golden, port, random_weights, timed

LENGTHS = (*range(1, 301), 1023, 1024, 1025, 2047, 2048, 2049, 4096)
NEAR = 1


def cliffs(times: dict[int, float]) -> dict[int, float]:
    """Quotient of each time and of its neighbours' on a straight line; ends have none."""
    lengths = sorted(times)
    found = {}
    for before, here, behind in zip(lengths, lengths[NEAR:], lengths[2 * NEAR :], strict=False):
        share = (here - before) / (behind - before)
        line = times[before] + share * (times[behind] - times[before])
        found[here] = round(times[here] / line, 3)
    return found


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all lengths; returns the record."""
    raw = SHAPE | {"n_layers": arguments.layers}
    weights = random_weights(raw)
    generator = torch.Generator("cuda").manual_seed(max(LENGTHS))
    shape = (1, max(LENGTHS))
    ids = torch.randint(raw["vocab_size"], shape, generator=generator, device="cuda")
    exact = golden(weights, raw, max(LENGTHS))(ids)
    torch.cuda.empty_cache()
    forward = port(weights, raw, max(LENGTHS))
    times: dict[int, float] = {}
    errors: dict[int, float] = {}
    worst: dict[int, float] = {}
    for length in LENGTHS:
        some = ids[:, :length].contiguous()
        apart = forward(some).float() - exact[:length]
        # Of single positions too: a wrong row among thousands would not show in the norm of all.
        rows = apart.norm(dim=-1) / exact[:length].norm(dim=-1)
        errors[length] = float(f"{(apart.norm() / exact[:length].norm()).item():.3e}")
        worst[length] = float(f"{rows.max().item():.3e}")
        del apart, rows
        times[length] = timed(functools.partial(forward, some), arguments.rounds, warm=2)
        print(f"{length:5} tokens {times[length]:8} ms, error {errors[length]:.2e}, of a position "
              f"{worst[length]:.2e}", flush=True)  # fmt: skip
    found = cliffs(times)
    return {
        "environment": environment(),
        "shape": raw,
        "milliseconds, back to back": times,
        "relative error of logits": errors,
        "relative error of the worst position": worst,
        "time by the line through the neighbours": found,
        "largest error": max(errors.values()),
        "largest error of a position": max(worst.values()),
        "steepest": max(found.items(), key=lambda item: item[1]),
        "largest step to the next length": max(
            (round(times[b] / times[a], 3), b) for a, b in itertools.pairwise(LENGTHS) if b == a + 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    print("steepest:", result["steepest"], result["largest step to the next length"],
          "largest error:", result["largest error"],
          "of a position:", result["largest error of a position"])  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
