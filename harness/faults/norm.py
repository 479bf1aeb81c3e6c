"""Faults of the norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import relax
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.core import wrap_nested

from harness.faults.model import Fault

Mutation = Callable[[Any], Any]


def normalised(
    x: Any,
    norm: Any,
    *,
    centre: bool = True,
    deviation: Callable[[Any, float, int], Any] | None = None,
    inner: str = "float32",
) -> Any:
    """Normalise over the last axis, with one or the other thing done differently.

    Parameters
    ----------
    x, norm
        As for `Operations.norm`.
    centre
        Whether the mean is taken off.
    deviation
        What the centred value is divided by, of the mean square, epsilon and width.
    inner
        Dtype of everything before the last rounding.
    """
    wide = op.astype(x, inner)._expr
    if centre:
        wide = relax.op.subtract(wide, relax.op.mean(wide, -1, keepdims=True))
    power = relax.op.mean(relax.op.multiply(wide, wide), -1, keepdims=True)
    if deviation is None:
        spread = relax.op.sqrt(relax.op.add(power, relax.const(norm.epsilon, inner)))
    else:
        spread = deviation(power, norm.epsilon, int(x.shape[-1]))
    wide = relax.op.divide(wide, spread)
    wide = relax.op.multiply(wide, op.astype(norm.weight, inner)._expr)
    if norm.bias is not None:
        wide = relax.op.add(wide, op.astype(norm.bias, inner)._expr)
    return op.astype(wrap_nested(wide, "norm"), x.dtype)


def _norm(**different: Any) -> Mutation:
    def mutate(operations: Any) -> Any:
        return replace(operations, norm=lambda x, norm: normalised(x, norm, **different))

    return mutate


def _epsilon(value: float) -> Mutation:
    def spread(power: Any, epsilon: float, width: int) -> Any:
        return relax.op.sqrt(relax.op.add(power, relax.const(value, "float32")))

    return _norm(deviation=spread)


def _epsilon_outside(power: Any, epsilon: float, width: int) -> Any:
    return relax.op.add(relax.op.sqrt(power), relax.const(epsilon, "float32"))


def _unbiased(power: Any, epsilon: float, width: int) -> Any:
    power = relax.op.multiply(power, relax.const(width / (width - 1), "float32"))
    return relax.op.sqrt(relax.op.add(power, relax.const(epsilon, "float32")))


def _variance_alone(power: Any, epsilon: float, width: int) -> Any:
    return relax.op.add(power, relax.const(epsilon, "float32"))


def _only(which: Callable[[Any], Any]) -> Mutation:
    """Return a mutation that passes by one norm of the block."""

    def mutate(operations: Any) -> Any:
        def block(ops: Any, block: Any, hidden: Any, tap: Any) -> Any:
            skipped = which(block)
            inner = replace(ops, norm=lambda x, norm: x if norm is skipped else ops.norm(x, norm))
            return operations.block(inner, block, hidden, tap)

        return replace(operations, block=block)

    return mutate


def _over_positions(x: Any, norm: Any) -> Any:
    """Normalise with the statistics of all positions together."""
    wide = op.astype(x, "float32")._expr
    wide = relax.op.subtract(wide, relax.op.mean(wide, -1, keepdims=True))
    power = relax.op.mean(relax.op.multiply(wide, wide), [1, 2], keepdims=True)
    spread = relax.op.sqrt(relax.op.add(power, relax.const(norm.epsilon, "float32")))
    wide = relax.op.multiply(relax.op.divide(wide, spread), op.astype(norm.weight, "float32")._expr)
    return op.astype(wrap_nested(wide, "norm"), x.dtype)


def _head_without_norm(operations: Any) -> Any:
    """Pass by the final norm alone: it is the only one that no block wires."""

    def block(ops: Any, block: Any, hidden: Any, tap: Any) -> Any:
        return operations.block(replace(ops, norm=operations.norm), block, hidden, tap)

    return replace(operations, block=block, norm=lambda x, norm: x)


def _fault(
    name: str,
    summary: str,
    operations: Mutation,
    evidence: str = "invented",
    tap: str = "norm_1",
    exposure: str = "trained",
) -> Fault:
    return Fault(name, "norm", evidence, exposure, tap, summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault("norm-rms", "the mean is not taken off, as in RMSNorm", _norm(centre=False)),
    _fault("norm-epsilon-1e-6", "epsilon is 1e-6", _epsilon(1e-6), exposure="small-embedding"),
    _fault("norm-epsilon-1e-12", "epsilon is 1e-12", _epsilon(1e-12), exposure="small-embedding"),
    _fault("norm-epsilon-1e-3", "epsilon is 1e-3", _epsilon(1e-3), exposure="small-embedding"),
    _fault(
        "norm-epsilon-outside",
        "epsilon is added to the standard deviation instead of the variance",
        _norm(deviation=_epsilon_outside),
        exposure="small-embedding",
    ),
    _fault("norm-unbiased", "the variance is divided by d - 1", _norm(deviation=_unbiased)),
    _fault(
        "norm-by-variance", "values are divided by the variance", _norm(deviation=_variance_alone)
    ),
    _fault(
        "norm-over-positions",
        "the variance is that of all positions together",
        lambda ops: replace(ops, norm=_over_positions),
    ),
    _fault("norm-1-skipped", "norm_1 is passed by", _only(lambda block: block.norm_1)),
    _fault(
        "norm-2-skipped", "norm_2 is passed by", _only(lambda block: block.norm_2), tap="norm_2"
    ),
    _fault(
        "norm-f-skipped",
        "the final norm is passed by",
        _head_without_norm,
        tap="transformer.norm_f",
    ),
    _fault(
        "rmsnorm-with-sum",
        "RMS norm divides by the root of the sum instead of the mean",
        _norm(
            centre=False,
            deviation=lambda power, epsilon, width: relax.op.sqrt(
                relax.op.add(
                    relax.op.multiply(power, relax.const(float(width), "float32")),
                    relax.const(epsilon, "float32"),
                )
            ),
        ),
        exposure="rmsnorm",
    ),
)
