"""The noise of accumulation knows every legitimate order: none is far off without being asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.synthetic import make_checkpoint
from harness.checkpoint.reader import Checkpoint
from harness.judge.factors import shipped
from harness.judge.limits import base
from harness.measure.compare import measure_tap
from harness.measure.oracle import Oracle, Part
from harness.measure.records import Measurement, Place
from harness.subjects.protocol import STORAGE_DTYPES, Rounding
from reference.config import MPTConfig
from reference.orders import GOLDEN, Order, held_out_orders, legitimate_orders, noise_orders

WIDE = {"scores": "float32", "probabilities": "float32"}
CONFIG = {
    "model_type": "mpt",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 1,
    "expansion_ratio": 4,
    # Counted from the last of so many positions, a bias has lost ten bits.
    "max_seq_len": 1024,
    "vocab_size": 97,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = Path(tmp_path_factory.mktemp("noise")) / "checkpoint"
    make_checkpoint(path, CONFIG, seed=5, dtype="bfloat16")
    return Checkpoint.open(path)


def as_subject(oracle: Oracle, part: Part, order: Order, tap: str, inputs: Any) -> Measurement:
    """Return the measurement of an order that is not among those that make the limit."""
    from reference import model

    truth = part.step(tap, inputs)
    seen = model.run_step(oracle.config, order, part.narrow, tap, inputs)
    exact = next(o for o, asked in zip(truth.orders, oracle.orders, strict=True)
                 if asked.compute == "float64")  # fmt: skip
    return measure_tap(
        "local", Place(0, tap), "p", oracle.cast(seen), truth.golden, [exact], oracle.storage,
        unrounded=truth.unrounded,
    )  # fmt: skip


def _rounded_once(order: Order) -> Order:
    """Leave out a rounding to storage, which is no noise of accumulation."""
    return replace(order, norm=replace(order.norm, round_normalised=False))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_no_legitimate_order_needs_to_be_asked(checkpoint: Checkpoint, dtype: str) -> None:
    config = MPTConfig.from_dict(CONFIG)
    oracle = Oracle(config, checkpoint.read, storage=dtype, rounding=Rounding(**WIDE))  # type: ignore[arg-type]
    part = oracle.part(0)
    stream = oracle.tensor(
        oracle.cast(oracle.tensor(np.random.default_rng(3).normal(size=(1, 96, 64))))
    )
    # The inputs of every step, rounded as a subject holds them.
    taps = {"input": stream, **part.chain(oracle.orders[0], stream)}
    every = (*legitimate_orders(dtype, **WIDE), *held_out_orders(dtype, **WIDE))  # type: ignore[arg-type]
    orders = [_rounded_once(order) for order in every if order.compute != GOLDEN.compute]
    factors = shipped()
    beyond = {}
    for tap in (name for name in taps if name != "input"):
        inputs = {name: taps[name] for name in part.inputs_of(tap)}
        for order in orders:
            found = as_subject(oracle, part, order, tap, inputs)
            limit = factors.get("local", dtype, "tail") * base(found, "tail", factors.alpha)
            if not found.observed.tail <= limit:
                beyond[tap, order.name] = (found.observed.tail, limit)
    assert not beyond


def test_every_choice_that_rounds_more_is_in_the_noise() -> None:
    noise, every = noise_orders(), legitimate_orders("float32")
    assert {order.anchor for order in every} - {"query"} <= {order.anchor for order in noise}
    assert {order.scale_on for order in every} == {order.scale_on for order in noise}
    assert {order.norm.variance for order in every} == {order.norm.variance for order in noise}
    assert any(order.norm.affine for order in noise)
    assert {order.softmax.kind for order in every} == {order.softmax.kind for order in noise}
    assert any(order.sum.kind == "chunks" for order in noise)
