"""Calibration: how far beyond the legitimate orders healthy implementations lie.

Healthy subjects are judged on seeded random checkpoints over all config features. For every mode,
dtype and statistic the largest ratio of a healthy value to the worst order (or its floor) is kept;
the factor is that ratio times a stated headroom. Nothing here looks at a fault.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.judge.factors import Factors
from harness.judge.limits import base
from harness.measure.oracle import Oracle, stored
from harness.measure.records import Failure, Measurement
from harness.measure.run import Case, Walk
from harness.measure.statistics import STATISTICS
from harness.subjects.parts import DeployedTorchParts
from harness.subjects.protocol import STORAGE_DTYPES, Rounding, rounding_of

# The floors of a check's few thousand statistics together are exceeded in one check of a thousand.
ALPHA = 1e-6
# The worst of n healthy runs is exceeded by the next one with probability 1/(n+1); the headroom
# carries the limit beyond the tail that some thousand runs can show. Where errors are chained they
# are amplified by whatever comes after them, and their tail is longer; so are the roundings along
# the chain of windows in which a bias is measured.
HEADROOM = {
    "alibi": 2.0,
    "local": 1.5,
    "teacher-forced": 2.0,
    "free-running": 2.0,
    "deployed": 2.0,
}
CHAINED = ("free-running", "deployed")
MODES = tuple(HEADROOM)


class OrderSubject(DeployedTorchParts):
    """One evaluation order of the reference, as a subject."""

    def __init__(self, checkpoint: Path, dtype: str, order: Any, rounding: Rounding) -> None:
        from reference.model import Reference

        opened = Checkpoint.open(checkpoint)
        read = stored(opened.read, dtype)
        model = Reference(opened.config, read, storage=dtype, order=order)  # type: ignore[arg-type]
        super().__init__(
            model, order.name, dtype, lambda: {name: read(name) for name in opened.names}
        )
        self.rounding = rounding


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    """Return a small config with features drawn at random, in the original's field names."""
    heads = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 12]))
    head_dim = int(rng.choice([1, 4, 8, 16, 20]))
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    kv_heads = int(rng.choice(divisors))
    alibi = bool(rng.random() < 0.85)
    attention: dict[str, Any] = {
        "attn_type": "grouped_query_attention" if kv_heads != heads else "multihead_attention",
        "alibi": alibi,
        "alibi_bias_max": int(rng.choice([4, 8, 16])),
        "qk_ln": bool(rng.random() < 0.2),
        "clip_qkv": float(rng.uniform(0.5, 6)) if rng.random() < 0.25 else None,
        "softmax_scale": float(rng.uniform(0.1, 0.6)) if rng.random() < 0.2 else None,
    }
    if kv_heads != heads:
        attention["kv_n_heads"] = kv_heads
    return {
        "model_type": "mpt",
        "d_model": heads * head_dim,
        "n_heads": heads,
        "n_layers": int(rng.integers(1, 4)),
        "expansion_ratio": int(rng.choice([1, 2, 3, 4])),
        "max_seq_len": int(rng.choice([8, 48, 96, 256])),
        "vocab_size": int(rng.choice([61, 97, 256, 509])),
        "no_bias": bool(rng.random() < 0.7),
        "learned_pos_emb": True,
        "norm_type": str(rng.choice(["low_precision_layernorm", "layernorm", "rmsnorm"])),
        "logit_scale": float(rng.uniform(0.2, 2)) if rng.random() < 0.15 else None,
        "embedding_fraction": 0.7 if rng.random() < 0.1 else 1.0,
        "tie_word_embeddings": bool(rng.random() < 0.85),
        "attn_config": attention,
        "torch_dtype": "bfloat16",
    }


def random_cases(
    rng: np.random.Generator, vocab_size: int, max_seq_len: int = 256
) -> tuple[Case, ...]:
    """Return three inputs: one token, one odd length, and a batch."""
    longest, wide = min(90, max_seq_len), min(40, max_seq_len)
    shapes = (
        (1, 1),
        (1, int(rng.integers(2, longest + 1))),
        (2, int(rng.integers(2, wide + 1))),
    )
    return tuple(
        Case(f"{rows}x{length}", rng.integers(0, vocab_size, (rows, length)).astype(np.int32))
        for rows, length in shapes
    )


@dataclass(frozen=True)
class HealthyRun:
    """The measurements of one healthy subject on one checkpoint."""

    seed: int
    subject: str
    dtype: str
    measurements: tuple[Measurement, ...]


def healthy_runs(
    seeds: range, subjects: Callable[[Path, str], Iterator[Any]], dtypes: tuple[str, ...]
) -> Iterator[HealthyRun]:
    """Judge healthy subjects on one random checkpoint a seed.

    Parameters
    ----------
    seeds
        Each makes its own config, weights and inputs.
    subjects
        Makes the subjects of one checkpoint and dtype.
    dtypes
        Storage dtypes.
    """
    from cases.synthetic import make_checkpoint
    from reference.config import MPTConfig

    for seed in seeds:
        rng = np.random.default_rng(seed)
        raw = random_config(rng)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            make_checkpoint(path, raw, seed=seed, dtype="bfloat16")
            opened = Checkpoint.open(path)
            config = MPTConfig.from_dict(raw)
            cases = random_cases(rng, config.vocab_size, config.max_seq_len)
            for dtype in dtypes:
                for subject in subjects(path, dtype):
                    oracle = Oracle(
                        config, opened.read, storage=dtype, rounding=rounding_of(subject)
                    )
                    events = list(Walk(oracle, subject, cases).events())
                    for event in events:
                        if isinstance(event, Failure):
                            raise RuntimeError(
                                f"seed {seed}: {subject.name}: {event.reason}\n{event.detail}"
                            )
                    yield HealthyRun(
                        seed,
                        subject.name,
                        dtype,
                        tuple(e for e in events if isinstance(e, Measurement)),
                    )


def calibration_subjects(path: Path, dtype: str) -> Iterator[Any]:
    """Return the healthy subjects that factors are made from."""
    from harness.subjects.relax import load as load_relax
    from harness.subjects.torch import load as load_torch
    from reference.orders import held_out_orders

    wide = {"scores": "float32", "probabilities": "float32"}
    for fields in ({}, wide, wide | {"residual": "fused", "activation": "fused"}):
        rounding = Rounding(**fields)  # type: ignore[arg-type]
        # The other held-out order is never seen here: false alarms are measured on it.
        tree = held_out_orders(dtype, **fields)[0]  # type: ignore[arg-type]
        yield OrderSubject(path, dtype, tree, rounding)
    yield load_torch(path, dtype=dtype, target="llvm")
    yield load_relax(path, dtype=dtype, target="llvm")


def unit_ratio(measurement: Measurement, statistic: str) -> float:
    """Return a statistic over its limit with a factor of one: the factor that would just pass."""
    return measurement.observed.get(statistic) / base(measurement, statistic, ALPHA)


@dataclass(frozen=True)
class Extreme:
    """The largest healthy ratio of one cell, and the run that showed it."""

    ratio: float
    where: str


Cell = tuple[str, str, str]
"""Mode, storage dtype and statistic."""


def extremes(seed: int) -> tuple[int, dict[Cell, Extreme]]:
    """Judge the healthy subjects of one seed; return the number of runs and the worst ratios."""
    worst: dict[Cell, Extreme] = {}
    runs = 0
    for run in healthy_runs(range(seed, seed + 1), calibration_subjects, STORAGE_DTYPES):
        runs += 1
        for measured in run.measurements:
            if measured.exact:
                continue
            for statistic in STATISTICS:
                ratio = unit_ratio(measured, statistic)
                cell = (measured.mode, run.dtype, statistic)
                if cell not in worst or not ratio <= worst[cell].ratio:
                    place = f"{measured.place.path}, {measured.prompt}"
                    worst[cell] = Extreme(ratio, f"seed {run.seed}, {run.subject}, {place}")
    return runs, worst


def calibrate(seeds: range, progress: Callable[[str], None], processes: int = 1) -> Factors:
    """Return factors with their evidence.

    Parameters
    ----------
    seeds
        Seeds of the random checkpoints.
    progress
        Called with a sentence after each seed.
    processes
        Seeds judged at once; the result does not depend on it.

    Raises
    ------
    RuntimeError
        If a healthy subject fails, or shows no finite error in some cell.
    """
    worst: dict[Cell, Extreme] = {}
    runs = 0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for seed, (count, found) in zip(seeds, pool.map(extremes, seeds), strict=True):
            runs += count
            for cell, extreme in found.items():
                if cell not in worst or not extreme.ratio <= worst[cell].ratio:
                    worst[cell] = extreme
            progress(f"seed {seed}: {count} healthy runs")
    return to_factors(worst, runs, seeds)


def to_factors(worst: Mapping[Cell, Extreme], runs: int, seeds: range) -> Factors:
    """Turn the worst healthy ratios into factors.

    Free-running taps and deployed logits see the same chained error, so that they share the larger
    factor of the two.
    """
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for mode in MODES:
        for dtype in STORAGE_DTYPES:
            for statistic in STATISTICS:
                shared = CHAINED if mode in CHAINED else (mode,)
                ratio = max(worst[other, dtype, statistic].ratio for other in shared)
                if not math.isfinite(ratio):
                    where = worst[mode, dtype, statistic].where
                    raise RuntimeError(f"{mode}/{dtype}/{statistic}: no finite ratio: {where}")
                ratios.setdefault(mode, {}).setdefault(dtype, {})[statistic] = ratio
    factors = {
        mode: {
            dtype: {name: HEADROOM[mode] * max(1.0, ratio) for name, ratio in cell.items()}
            for dtype, cell in by_dtype.items()
        }
        for mode, by_dtype in ratios.items()
    }
    record = {
        "runs": runs,
        "seeds": [seeds.start, seeds.stop],
        "headroom": HEADROOM,
        "worst_healthy_ratio": ratios,
        "worst_healthy_run": {"/".join(cell): worst[cell].where for cell in sorted(worst)},
        "command": f"mpt-conform calibrate --seeds {seeds.start}:{seeds.stop}",
    }
    return Factors(ALPHA, factors, record)
