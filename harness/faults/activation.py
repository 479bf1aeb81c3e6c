"""Faults of the activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.relax.frontend.nn import op

from harness.faults.model import Fault

Mutation = Callable[[Any], Any]


def _activation(function: Callable[[Any], Any]) -> Mutation:
    """Return a mutation that applies ``function`` in float32 and rounds once."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations, activation=lambda x: op.astype(function(op.astype(x, "float32")), x.dtype)
        )

    return mutate


def _quick(x: Any) -> Any:
    return x * op.sigmoid(x * 1.702)


def _without_root(x: Any) -> Any:
    """Apply GELU with erf(x) in place of erf(x / sqrt 2)."""
    return op.gelu(x * 2.0**0.5) * 2.0**-0.5


def _fault(name: str, summary: str, operations: Mutation, evidence: str = "invented") -> Fault:
    return Fault(name, "activation", evidence, "trained", "ffn.act", summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "gelu-tanh",
        "GELU by its tanh approximation",
        _activation(lambda x: op.gelu(x, approximate="tanh")),
        "https://github.com/ggml-org/llama.cpp (src/models/mpt.cpp: LLM_FFN_GELU)",
    ),
    _fault("gelu-quick", "GELU by x * sigmoid(1.702 x)", _activation(_quick)),
    _fault("relu-for-gelu", "ReLU instead of GELU", _activation(op.relu)),
    _fault("silu-for-gelu", "SiLU instead of GELU", _activation(op.silu)),
    _fault("gelu-without-root", "erf(x) instead of erf(x / sqrt 2)", _activation(_without_root)),
    _fault("gelu-squared", "GELU is squared", _activation(lambda x: op.gelu(x) * op.gelu(x))),
    _fault("gelu-twice", "GELU is applied twice", _activation(lambda x: op.gelu(op.gelu(x)))),
    _fault("gelu-absent", "the MLP is linear", _activation(lambda x: x * 1.0)),
    _fault(
        "gelu-tail-cut",
        "values below -3 become zero",
        _activation(lambda x: op.gelu(op.relu(x + 3.0) - 3.0)),
    ),
)
