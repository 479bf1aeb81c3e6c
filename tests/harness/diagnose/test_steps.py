"""The step functions of the port: local, and changed by a fault where it acts and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from harness.diagnose.steps import HEALTHY, Steps, library_steps
from harness.diagnose.weights import faulty_parameters, healthy_parameters
from relax_impl.config import MPTConfig
from relax_impl.topology import topology

B, S = 2, 7


@pytest.fixture(scope="module")
def config(config_of: Callable[..., dict[str, Any]]) -> MPTConfig:
    return MPTConfig.from_dict(config_of())


@pytest.fixture(scope="module")
def up_proj(config: MPTConfig) -> Steps:
    return library_steps("block", "ffn.up_proj", config, "float32")


def test_a_step_reads_its_own_inputs_and_weights_only(up_proj: Steps) -> None:
    assert up_proj.reads() == ("norm_2", "ffn.up_proj.weight")


def test_a_fault_changes_the_step_that_it_acts_on(up_proj: Steps) -> None:
    assert up_proj.differs("linear-bfloat16")
    for elsewhere in ("gelu-tanh", "alibi-sign", "norm-rms", "mask-absent", "residual-minus"):
        assert not up_proj.differs(elsewhere), elsewhere


def test_a_fault_of_what_the_config_lacks_is_not_there(up_proj: Steps) -> None:
    # There is no query norm that could be passed by.
    assert not up_proj.differs("qk-ln-ignored")


def test_the_healthy_step_is_the_product(up_proj: Steps, config: MPTConfig) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, S, config.d_model)).astype(np.float32)
    w = rng.normal(size=(config.hidden_dim, config.d_model)).astype(np.float32)
    found = up_proj.run(HEALTHY, {"norm_2": x, "ffn.up_proj.weight": w}).astype(np.float64)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    # Higham, Accuracy and Stability, (3.5): |error| <= gamma_n |x| |w| in any order of summation.
    unit = np.finfo(np.float32).eps / 2
    gamma = config.d_model * unit / (1 - config.d_model * unit)
    assert (np.abs(found - exact) <= gamma * (np.abs(x) @ np.abs(w.T))).all()
    assert not np.array_equal(found, exact)


def test_a_faulty_step_differs_in_its_values(config: MPTConfig) -> None:
    steps = library_steps("block", "ffn.act", config, "float32")
    x = np.linspace(-4, 4, B * S * config.hidden_dim, dtype=np.float32)
    values = {"ffn.up_proj": x.reshape(B, S, -1)}
    healthy = steps.run(HEALTHY, values)
    relu = steps.run("relu-for-gelu", values)
    assert np.array_equal(relu, np.maximum(values["ffn.up_proj"], 0))
    assert np.abs(steps.run("gelu-tanh", values) - healthy).max() > 1e-4


def test_mapper_faults_reach_the_layer_they_are_in_and_its_partner(config: MPTConfig) -> None:
    rng = np.random.default_rng(1)
    held = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in topology(config).items()
    }
    names = ("norm_1.weight",)

    def found(layer: int) -> dict[str, np.ndarray]:
        prefix = f"transformer.blocks.{layer}."
        healthy = healthy_parameters(config, prefix, names, held.__getitem__, "float32")
        assert np.array_equal(healthy["norm_1.weight"], held[prefix + "norm_1.weight"])
        return {
            name: arrays["norm_1.weight"]
            for name, arrays in faulty_parameters(
                config, layer, names, healthy, held.__getitem__, "float32"
            )
        }

    for layer in range(config.n_layers):
        faulty = found(layer)
        assert (faulty["norm-gammas-ones"] == 1).all()
        other = held[f"transformer.blocks.{layer}.norm_2.weight"]
        assert np.array_equal(faulty["norm-1-norm-2-swapped"], other)
        # Layers are exchanged: whichever one looks finds its partner's tensor.
        partner = held[f"transformer.blocks.{1 - layer}.norm_1.weight"]
        assert np.array_equal(faulty["layers-reversed"], partner)
        assert "out-proj-transposed" not in faulty
