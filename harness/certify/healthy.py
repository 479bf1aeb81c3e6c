"""Healthy implementations through the gate, on what calibration has never seen.

Seeds, configs and weights are others than those of the calibration, and one of the evaluation
orders, ``lanes``, made no factor. What conforms to nothing but the definition of MPT must pass.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.calibrate import OrderSubject, random_cases, random_config
from harness.certify.observe import Observation, observe, remember
from harness.certify.results import HealthyRun
from harness.errors import BadInput
from harness.pipeline import SHIPPED, Evidence, Request, check
from harness.subjects.protocol import STORAGE_DTYPES, Rounding

FIRST_SEED = 1_000_000
"""Calibration counts from 0."""
CONFIGS = 35
"""Configs of a campaign; later seeds take them again, with other weights and inputs."""
HEAD_DIMS = (6, 10, 12, 24, 32)
VOCABULARIES = (73, 131, 384)
"""Sizes that no config of the calibration has, so that none of its configs comes again."""
TRAINED = "trained"


def require_disjoint(seeds: range, calibrated: Any) -> None:
    """Refuse seeds that made the factors.

    Raises
    ------
    BadInput
        If a seed is in both.
    """
    # One range, or one for each kind of checkpoint.
    for first, stop in np.asarray(calibrated, dtype=np.int64).reshape(-1, 2):
        if max(seeds.start, first) < min(seeds.stop, stop):
            raise BadInput(
                "these seeds made the factors, and prove nothing about them",
                where="--seeds",
                expected=f"outside {first}:{stop}",
                found=f"{seeds.start}:{seeds.stop}",
            )


def certified_config(rng: np.random.Generator) -> dict[str, Any]:
    """Return a random config of sizes that calibration does not draw."""
    raw = random_config(rng)
    return raw | {
        "d_model": raw["n_heads"] * int(rng.choice(HEAD_DIMS)),
        "vocab_size": int(rng.choice(VOCABULARIES)),
    }


def subjects(path: Path, dtype: str, target: str, rng: np.random.Generator) -> Iterator[Any]:
    """Yield the healthy subjects of one checkpoint: four implementations that share no arithmetic.

    The order declares one rounding policy of several, drawn at random.
    """
    from harness.subjects.relax import load as load_relax
    from harness.subjects.torch import load as load_torch
    from harness.subjects.transformers import load as load_transformers
    from reference.orders import held_out_orders

    policies: tuple[dict[str, Any], ...] = (
        {},
        {"scores": "float32", "probabilities": "float32"},
        {"residual": "fused", "activation": "fused"},
        {
            "scores": "float32",
            "probabilities": "float32",
            "residual": "fused",
            "activation": "fused",
        },
    )
    fields = policies[int(rng.integers(len(policies)))]
    lanes = next(o for o in held_out_orders(dtype, **fields) if o.name.startswith("lanes"))  # type: ignore[arg-type]
    yield OrderSubject(path, dtype, lanes, Rounding(**fields))
    yield load_torch(path, dtype=dtype, target=target)
    yield load_relax(path, dtype=dtype, target=target)
    try:
        yield load_transformers(path, dtype=dtype, target=target)
    except BadInput:
        # It does not honour every field of the original; where it does not, it is not MPT.
        return


def healthy(seed: int | None, target: str) -> list[HealthyRun]:
    """Judge every healthy subject on the checkpoint of one seed, or on the trained one."""
    from cases.synthetic import make_checkpoint

    if seed is None:
        return list(_judged(TRAINED, SHIPPED, None, target, np.random.default_rng(FIRST_SEED)))
    raw = certified_config(np.random.default_rng(FIRST_SEED + (seed - FIRST_SEED) % CONFIGS))
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        make_checkpoint(path, raw, seed=seed, dtype="bfloat16")
        prompts = Path(folder) / "prompts"
        prompts.mkdir()
        for case in random_cases(rng, raw["vocab_size"], raw["max_seq_len"]):
            np.save(prompts / f"{case.name}.npy", case.ids)
        return list(_judged(f"seed {seed}", path, prompts, target, rng))


def _judged(
    weights: str, path: Path, prompts: Path | None, target: str, rng: np.random.Generator
) -> Iterator[HealthyRun]:
    forget = remember()
    for dtype in STORAGE_DTYPES:
        # No dtype asks what another one asked.
        forget()
        for subject in subjects(path, dtype, target, rng):
            yield _one(weights, path, prompts, dtype, subject)


def _one(weights: str, path: Path, prompts: Path | None, dtype: str, subject: Any) -> HealthyRun:
    started = time.perf_counter()
    seen: list[Observation] = []
    inputs = 0

    def keep(evidence: Evidence) -> None:
        nonlocal inputs
        inputs = len(evidence.walk.streams)
        seen.append(observe(evidence))

    source = None if prompts is None else str(prompts)
    request = Request(checkpoint=path, prompts=source, dtype=dtype, diagnose=False)
    try:
        report = check(request, given=subject, witness=keep)
    except Exception as error:
        spent = time.perf_counter() - started
        text = f"{type(error).__name__}: {error}"
        return HealthyRun(
            weights, subject.name, dtype, 0, "error", "", None, seconds=spent, detail=text
        )
    first = report.first_divergence
    observation = seen[0] if seen else Observation(None, {}, {})
    return HealthyRun(
        weights,
        subject.name,
        dtype,
        inputs,
        report.verdict,
        first.tap if first else "",
        observation.ratio,
        observation.ratios,
        observation.rules,
        time.perf_counter() - started,
        (first.reason if first else "") or report.reason,
    )
