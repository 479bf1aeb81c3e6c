"""Faults of precision: a rounding that the subject has not declared.

Which roundings are faults is a decision. The port declares ``Rounding(scores="float32",
probabilities="float32")``: its scores, probabilities and accumulators stay float32, and each
sub-module rounds to storage once. An implementation that rounds scores or probabilities to storage
*and says so*, as the original does, is legitimate and gets wider limits. Under the port's own
declaration the same rounding is a fault: the declaration promises what it does not keep, and the
limits made from it must be tight enough to notice. All of these are meant for float16 storage.

Two of them are decided apart, because a compiler makes them by itself.

*Accumulation in float16* is what Relax makes of a matrix product without ``out_dtype``. It is a
rounding policy like any other, if a poor one: an error that grows with the length of the sum, of
either sign, on every element. So it is a fault unless ``accumulator="float16"`` is declared; then
the limits come from orders that accumulate so too, and it conforms. The declaration excuses sums
and nothing else, and stands in the verdict for everyone to read.

*GELU with a rounded erf* is what Relax makes of ``gelu`` in float16: erf is rounded before 1 is
added to it, where it is near -1. The result is exactly zero for arguments between -5.5 and -3.7 and
off by up to 14 % between -3.2 and -2. That is no rounding of GELU but another function, with an
error of one sign at the same arguments every time, and no declaration covers it:
``Rounding.activation`` says whether GELU is given the rounded up-projection, and GELU itself is
rounded once under either. So it is a fault whatever is declared.

``tests/harness/test_rounding_policy.py`` holds both decisions, both ways.

The bias is read off the result of the attention, so that the probe of ALiBi is the first to see
what rounds scores, probabilities or context; queries, keys and values it chooses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from tvm import tirx
from tvm.relax.frontend.nn import op

from harness.faults.model import Fault
from harness.faults.norm import normalised
from harness.faults.rounding import passed, through
from harness.faults.weights import changed

Mutation = Callable[[Any], Any]

_PORT = "https://github.com/mlc-ai/mlc-llm/pull/460 (commit 418aadba)"
_TVM = "apache-tvm 0.27, legalize_ops/linear_algebra.py: te.sum in the product's dtype"
_FOUNDRY = "https://github.com/mosaicml/llm-foundry/pull/329"
_FLASH = "https://github.com/Dao-AILab/flash-attention/pull/846"
_SMALLEST = 2.0**-14
"""Smallest normal float16."""


def _attention(**fields: Any) -> Mutation:
    return lambda ops: replace(ops, attention=replace(ops.attention, **fields))


def _bias(change: Callable[[Any, Any], Any]) -> Mutation:
    return _attention(bias=change)


def _slopes(dtype: Any) -> Mutation:
    def mutate(ops: Any) -> Any:
        return replace(ops, slopes=lambda c: ops.slopes(c).astype(dtype).astype(np.float32))

    return mutate


def _narrowed(field: str, dtype: str) -> Mutation:
    """Return a mutation that rounds the result of an operation to ``dtype`` on the way."""

    def mutate(ops: Any) -> Any:
        function = getattr(ops, field)

        def narrow(*arguments: Any) -> Any:
            result = function(*arguments)
            return passed(result, dtype)

        return replace(ops, **{field: narrow})

    return mutate


def _inputs(*which: int, dtype: str) -> Mutation:
    """Return a mutation that rounds some of q, k, v to ``dtype`` before the attention."""

    def mutate(ops: Any) -> Any:
        def attention(*arguments: Any) -> Any:
            rounded = [passed(x, dtype) if i in which else x for i, x in enumerate(arguments)]
            return ops.attention(*rounded)

        return replace(ops, attention=attention)

    return mutate


def _unscaled_scores(ops: Any) -> Any:
    """Round q.k to float16 before it is scaled."""

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        half, scale = through("float16"), config.scale
        wide = replace(
            ops.attention,
            scale=lambda config: 1.0,
            bias=lambda slope, distance: slope * distance / scale,
            score=lambda value: half(value) * scale,
        )
        return wide(q, k, v, slopes, config)

    return replace(ops, attention=attention)


def _scaled_queries(ops: Any) -> Any:
    """Scale the queries in storage, which rounds them unless the scale is a power of two."""

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        inner = replace(ops.attention, scale=lambda config: 1.0)
        return inner(q * config.scale, k, v, slopes, config)

    return replace(ops, attention=attention)


def _narrow_sums(x: Any, linear: Any) -> Any:
    """Multiply with an accumulator in storage."""
    result = op.matmul(x, op.permute_dims(linear.matrix()))
    return result if linear.bias is None else result + linear.bias


def _narrow_parts(size: int) -> Callable[[Any, Any], Any]:
    """Return a product whose partial sums of ``size`` terms are added in storage."""

    def linear(x: Any, linear: Any) -> Any:
        width = int(x.shape[-1])
        cuts = list(range(size, width, size))
        matrix = op.permute_dims(linear.matrix())
        total = None
        parts = zip(op.split(x, cuts, axis=-1), op.split(matrix, cuts, axis=0), strict=True)
        for part, rows in parts:
            product = op.astype(op.matmul(part, rows, out_dtype="float32"), x.dtype)
            total = product if total is None else total + product
        return total if linear.bias is None else total + linear.bias

    return linear


def _narrow_logits(hidden: Any, table: Any, logit_scale: float | None) -> Any:
    logits = op.astype(op.matmul(hidden, op.permute_dims(table.matrix())), "float32")
    return logits if logit_scale is None else logits * logit_scale


def _flushed(ops: Any) -> Any:
    """Set results of the activation that are subnormal in float16 to zero."""

    def activation(x: Any) -> Any:
        from tvm import te

        def emit(y: Any) -> Any:
            def element(*at: Any) -> Any:
                small = tirx.abs(y[at].astype("float32")) < tirx.const(_SMALLEST, "float32")
                return tirx.Select(small, tirx.const(0.0, y.dtype), y[at])

            return te.compute(y.shape, element, name="flushed")

        return op.tensor_expr_op(emit, "flushed", [ops.activation(x)])

    return replace(ops, activation=activation)


def _fault(
    name: str,
    first_tap: str,
    summary: str,
    operations: Mutation,
    evidence: str = "invented",
    exposure: str = "trained",
) -> Fault:
    return Fault(name, "precision", evidence, exposure, first_tap, summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "linear-accumulates-float16",
        "attn.Wqkv",
        "matrix products accumulate in float16",
        lambda ops: replace(ops, linear=_narrow_sums),
        _TVM,
    ),
    _fault(
        "linear-adds-float16-of-32",
        "attn.Wqkv",
        "partial sums of 32 terms are added in float16",
        lambda ops: replace(ops, linear=_narrow_parts(32)),
    ),
    _fault(
        "linear-adds-float16-halves",
        "attn.Wqkv",
        "the two halves of a sum are rounded to float16 and added",
        lambda ops: replace(ops, linear=_narrow_parts(96)),
    ),
    _fault(
        "linear-bfloat16",
        "attn.Wqkv",
        "results of matrix products pass through bfloat16",
        _narrowed("linear", "bfloat16"),
    ),
    _fault(
        "logits-accumulate-float16",
        "logits",
        "logits accumulate in float16",
        lambda ops: replace(ops, unembed=_narrow_logits),
        _TVM,
    ),
    _fault(
        "logits-bfloat16",
        "logits",
        "logits pass through bfloat16",
        _narrowed("unembed", "bfloat16"),
    ),
    _fault(
        "scores-float16",
        "alibi",
        "scores are rounded to float16 before the softmax",
        _attention(score=through("float16")),
        _PORT,
        "loud-scores",
    ),
    _fault(
        "scores-bfloat16",
        "alibi",
        "scores are rounded to bfloat16 before the softmax",
        _attention(score=through("bfloat16")),
    ),
    _fault(
        "scores-unscaled-float16",
        "alibi",
        "q.k is rounded to float16 before it is scaled",
        _unscaled_scores,
        _PORT,
        "loud-scores",
    ),
    _fault(
        "scaled-queries-float16",
        "attn.context",
        "queries are scaled in float16",
        _scaled_queries,
        exposure="loud-scores",
    ),
    _fault(
        "softmax-scale-bfloat16",
        "attn.context",
        "the scale is a bfloat16 constant",
        _attention(scale=lambda config: float(np.float32(config.scale).astype(ml_dtypes.bfloat16))),
        exposure="loud-scores",
    ),
    _fault(
        "probabilities-float16",
        "alibi",
        "probabilities are rounded to float16 before they weigh the values",
        _attention(probability=through("float16")),
    ),
    _fault(
        "probabilities-bfloat16",
        "alibi",
        "probabilities are rounded to bfloat16 before they weigh the values",
        _attention(probability=through("bfloat16")),
    ),
    _fault(
        "slopes-float16",
        "alibi",
        "slopes are held in float16, as by module.half()",
        _slopes(np.float16),
        _FLASH,
    ),
    _fault(
        "slopes-bfloat16",
        "alibi",
        "slopes are held in bfloat16",
        _slopes(ml_dtypes.bfloat16),
        _FLASH,
    ),
    _fault(
        "slopes-float16-subnormal",
        "alibi",
        "slopes are held in float16, whose subnormals lose digits of the flattest heads",
        _slopes(np.float16),
        _FLASH,
        "long-32-heads-bias-max-16",
    ),
    _fault(
        "bias-float16",
        "alibi",
        "the bias is rounded to float16",
        _bias(lambda slope, distance: through("float16")(slope * distance)),
        exposure="long-12-heads",
    ),
    _fault(
        "bias-bfloat16",
        "alibi",
        "the bias is rounded to bfloat16",
        _bias(lambda slope, distance: through("bfloat16")(slope * distance)),
        _FOUNDRY,
    ),
    _fault(
        "bias-far-anchor-float16",
        "alibi",
        "a float16 table of the bias is sliced 4096 keys away from its end",
        _bias(lambda slope, distance: through("float16")(slope * (distance - 4096.0))),
    ),
    _fault(
        "distances-bfloat16",
        "alibi",
        "distances are held in bfloat16, which has no odd integers above 256",
        _bias(lambda slope, distance: slope * through("bfloat16")(distance)),
        exposure="long-12-heads",
    ),
    _fault(
        "values-bfloat16",
        "attn.context",
        "values pass through bfloat16 before the attention",
        _inputs(2, dtype="bfloat16"),
    ),
    _fault(
        "keys-bfloat16",
        "attn.context",
        "keys pass through bfloat16 before the attention",
        _inputs(1, dtype="bfloat16"),
    ),
    _fault(
        "context-bfloat16",
        "alibi",
        "the context passes through bfloat16",
        _narrowed("attention", "bfloat16"),
    ),
    _fault(
        "norm-bfloat16",
        "norm_1",
        "the norm's result passes through bfloat16",
        _narrowed("norm", "bfloat16"),
    ),
    _fault(
        "norm-statistics-float16",
        "norm_1",
        "mean and variance are computed in float16",
        lambda ops: replace(ops, norm=lambda x, norm: normalised(x, norm, inner="float16")),
    ),
    _fault(
        "gelu-half-erf",
        "ffn.act",
        "erf is rounded to float16 before 1 is added, as Relax does when left alone",
        lambda ops: replace(ops, activation=op.gelu),
        "apache-tvm 0.27: legalisation of relax.nn.gelu in float16",
    ),
    _fault(
        "gelu-bfloat16",
        "ffn.act",
        "the activation passes through bfloat16",
        _narrowed("activation", "bfloat16"),
    ),
    _fault(
        "gelu-subnormals-flushed",
        "ffn.act",
        "subnormal results of the activation become zero",
        _flushed,
    ),
    _fault(
        "residual-bfloat16",
        "attn.residual",
        "the stream passes through bfloat16 at every addition",
        _narrowed("residual", "bfloat16"),
    ),
    Fault(
        "weights-subnormals-flushed",
        "precision",
        "invented",
        "trained",
        "attn.Wqkv",
        "weights that are subnormal in float16 become zero",
        weights=changed(
            lambda array, config: np.where(np.abs(array.astype(np.float32)) < _SMALLEST, 0, array),
            "attn.Wqkv.weight",
            "attn.out_proj.weight",
            "ffn.up_proj.weight",
            "ffn.down_proj.weight",
        ),
    ),
)
