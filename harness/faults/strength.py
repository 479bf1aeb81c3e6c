"""Mechanisms whose strength can be turned down, to find where detection ends.

A library of named faults says little about the small ones between them. Each mechanism here makes a
fault of any strength; at strength 0 it would be none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm.relax.frontend.nn import op

from harness.faults.model import Area, Fault
from harness.faults.weights import changed


@dataclass(frozen=True)
class Mechanism:
    """One way to be wrong, by any amount.

    Attributes
    ----------
    name, area, first_tap
        As of the faults it makes.
    summary
        What strength means.
    fault
        Strength to fields of the fault.
    """

    name: str
    area: Area
    first_tap: str
    summary: str
    fault: Callable[[float], dict[str, Any]]

    def at(self, strength: float) -> Fault:
        """Return the fault of one strength."""
        return Fault(
            name=f"{self.name}={strength:.3g}",
            area=self.area,
            evidence="invented",
            exposure="trained",
            first_tap=self.first_tap,
            summary=f"{self.summary}, {strength:.3g}",
            **self.fault(strength),
        )


def _operations(mutate: Callable[[Any, float], Any]) -> Callable[[float], dict[str, Any]]:
    return lambda strength: {"operations": lambda operations: mutate(operations, strength)}


def _weights(
    change: Callable[[Any, float], Any], *tensors: str
) -> Callable[[float], dict[str, Any]]:
    return lambda strength: {
        "weights": changed(lambda array, config: change(array, strength), *tensors)
    }


def _slopes(operations: Any, strength: float) -> Any:
    plain = operations.slopes
    return replace(operations, slopes=lambda config: plain(config) * (1.0 + strength))


def _one_slope(operations: Any, strength: float) -> Any:
    plain = operations.slopes

    def slopes(config: Any) -> Any:
        result = np.array(plain(config))
        result[config.n_heads // 2] *= 1.0 + strength
        return result

    return replace(operations, slopes=slopes)


def _update(operations: Any, strength: float) -> Any:
    def residual(x: Any, update: Any) -> Any:
        wide = op.astype(x, "float32") + op.astype(update, "float32") * (1.0 + strength)
        return op.astype(wide, x.dtype)

    return replace(operations, residual=residual)


def _towards_tanh(operations: Any, strength: float) -> Any:
    def activation(x: Any) -> Any:
        wide = op.astype(x, "float32")
        mixed = op.gelu(wide) * (1.0 - strength) + op.gelu(wide, approximate="tanh") * strength
        return op.astype(mixed, x.dtype)

    return replace(operations, activation=activation)


def _scale(strength: float) -> dict[str, Any]:
    def config(parsed: Any) -> Any:
        return replace(parsed, softmax_scale=parsed.scale * (1.0 + strength))

    return {"config": config}


def _epsilon(strength: float) -> dict[str, Any]:
    def config(parsed: Any) -> Any:
        return replace(parsed, layer_norm_epsilon=parsed.layer_norm_epsilon * (1.0 + strength))

    return {"config": config}


def _noisy(array: Any, strength: float) -> Any:
    noise = np.random.default_rng(array.size).standard_normal(array.shape)
    wide = array.astype(np.float64)
    return (wide + strength * wide.std() * noise).astype(array.dtype)


def _one_element(array: Any, strength: float) -> Any:
    wide = array.astype(np.float64)
    wide[array.shape[0] // 2, array.shape[1] // 3] += strength * wide.std()
    return wide.astype(array.dtype)


def _larger(array: Any, strength: float) -> Any:
    return (array.astype(np.float64) * (1.0 + strength)).astype(array.dtype)


def _one_gamma(array: Any, strength: float) -> Any:
    wide = array.astype(np.float64)
    wide[array.size // 2] *= 1.0 + strength
    return wide.astype(array.dtype)


MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism("slopes", "alibi", "alibi", "all slopes too steep, relative", _operations(_slopes)),
    Mechanism(
        "one-slope", "alibi", "alibi", "one slope too steep, relative", _operations(_one_slope)
    ),
    Mechanism("scale", "mask", "attn.context", "softmax scale too large, relative", _scale),
    Mechanism("epsilon", "norm", "norm_1", "epsilon too large, relative", _epsilon),
    Mechanism(
        "update",
        "residual",
        "attn.residual",
        "updates of the stream too large, relative",
        _operations(_update),
    ),
    Mechanism(
        "towards-tanh",
        "activation",
        "ffn.act",
        "share of the tanh approximation in GELU",
        _operations(_towards_tanh),
    ),
    Mechanism(
        "gammas",
        "weights",
        "norm_1",
        "gammas too large, relative",
        _weights(_larger, "norm_1.weight"),
    ),
    Mechanism(
        "one-gamma",
        "weights",
        "norm_1",
        "one gamma too large, relative",
        _weights(_one_gamma, "norm_1.weight"),
    ),
    Mechanism(
        "noise",
        "weights",
        "attn.out_proj",
        "noise on a matrix, in its standard deviation",
        _weights(_noisy, "attn.out_proj.weight"),
    ),
    Mechanism(
        "one-weight",
        "weights",
        "ffn.up_proj",
        "one element of a matrix off, in its standard deviation",
        _weights(_one_element, "ffn.up_proj.weight"),
    ),
)
