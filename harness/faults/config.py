"""Faults of config: a field is ignored, defaulted or read as something else.

Where the field also decides which tensors there are, the port would not even load; the fault then
is what such ports do instead: they load the tensors and do not use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harness.faults.model import Fault
from harness.faults.wiring import (
    bias_after_activation,
    bias_on_every_rank,
    clip_after_norm,
    clip_before_bias,
    first_kv_head,
    heads_in_turn,
    per_head_norm,
    rms_query_key_norm,
    skip_norms,
    unwired,
    without_bias,
)

_TRANSFORMERS = "transformers 5.23, models/mpt: the field is read and not used"
_VLLM = "https://github.com/vllm-project/vllm (MPTAttention: scaling = head_dim**-0.5)"
_LLAMA = "https://github.com/ggml-org/llama.cpp/pull/3417"


def _field(**fields: Any) -> Callable[[Any], Any]:
    """Return a mutation of the parsed config."""
    return lambda config: replace(config, **fields)


def _scale(factor: Callable[[Any], float]) -> Callable[[Any], Any]:
    """Return a mutation that multiplies q.k by ``factor(config)``."""

    def mutate(operations: Any) -> Any:
        return replace(operations, attention=replace(operations.attention, scale=factor))

    return mutate


def _clip(change: Callable[[Any, Any, float | None], Any]) -> Callable[[Any], Any]:
    """Return a mutation of the clipping; ``change`` gets the plain clip, a tensor and the limit."""

    def mutate(operations: Any) -> Any:
        return replace(
            operations,
            clip=lambda x, limit: x if limit is None else change(operations.clip, x, limit),
        )

    return mutate


def _clip_part(*chosen: int) -> Callable[[Any], Any]:
    """Clip only some of q, k, v."""

    def change(clip: Any, x: Any, limit: float | None) -> Any:
        from tvm.relax.frontend.nn import op

        third = x.shape[-1] // 3
        parts = op.split(x, [third, 2 * third], axis=-1)
        return op.concat(
            [clip(part, limit) if i in chosen else part for i, part in enumerate(parts)], dim=-1
        )

    return _clip(change)


def _clip_one_sided(clip: Any, x: Any, limit: float | None) -> Any:
    from tvm import relax
    from tvm.relax.frontend.nn.core import wrap_nested

    return wrap_nested(relax.op.minimum(x._expr, relax.const(limit, x.dtype)), "clip")


def _always_alibi(operations: Any) -> Any:
    """Add the bias although the config says no."""
    from relax_impl.alibi import alibi_slopes

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        return operations.attention(q, k, v, slopes, replace(config, alibi=True))

    return replace(
        operations,
        attention=attention,
        slopes=lambda c: alibi_slopes(c.n_heads, c.alibi_bias_max).astype("float32"),
    )


def _head_of_the_embedding(weight_map: Any, config: Any, layer: int | None) -> Any:
    """Read lm_head, and store the token embedding in its place."""
    table, head = "transformer.wte.weight", "lm_head.weight"
    seen: list[Any] = []

    def keep(array: Any) -> Any:
        seen.append(array)
        return weight_map.map_func[table](array)

    # The embedding is loaded first: it is the first tensor of a checkpoint.
    functions = {table: keep, head: lambda array: weight_map.map_func[head](seen[-1])}
    return replace(weight_map, map_func={**weight_map.map_func, **functions})


def _fault(
    name: str,
    first_tap: str,
    summary: str,
    evidence: str,
    exposure: str,
    **mutation: Any,
) -> Fault:
    return Fault(name, "config", evidence, exposure, first_tap, summary, **mutation)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "alibi-bias-max-ignored",
        "alibi",
        "alibi_bias_max is taken to be 8 whatever the config says",
        _TRANSFORMERS,
        "bias-max-16-heads-12",
        config=_field(alibi_bias_max=8),
    ),
    _fault(
        "alibi-always-on",
        "alibi",
        "alibi: false is not honoured and the bias is added to the learned positions",
        _TRANSFORMERS,
        "wpe",
        operations=_always_alibi,
    ),
    _fault(
        "clip-qkv-ignored",
        "attn.Wqkv",
        "clip_qkv is ignored",
        "https://github.com/mosaicml/llm-foundry/issues/353",
        "clip",
        config=_field(clip_qkv=None),
    ),
    _fault(
        "clip-qkv-not-values",
        "attn.Wqkv",
        "queries and keys are clipped, values are not",
        "invented",
        "clip",
        operations=_clip_part(0, 1),
    ),
    _fault(
        "clip-qkv-values-only",
        "attn.Wqkv",
        "values are clipped, queries and keys are not",
        "invented",
        "clip",
        operations=_clip_part(2),
    ),
    _fault(
        "clip-qkv-from-above",
        "attn.Wqkv",
        "the fused projection is clipped from above only",
        "invented",
        "clip",
        operations=_clip(_clip_one_sided),
    ),
    _fault(
        "clip-qkv-by-square-root",
        "attn.Wqkv",
        "the square root of clip_qkv is used",
        "invented",
        "clip",
        operations=_clip(lambda clip, x, limit: clip(x, (limit or 0.0) ** 0.5)),
    ),
    _fault(
        "clip-qkv-after-qk-ln",
        "attn.Wqkv",
        "queries and keys are clipped after their norms instead of before",
        "invented",
        "clip-qk-ln",
        operations=unwired(clip_after_norm),
    ),
    _fault(
        "clip-qkv-before-bias",
        "attn.Wqkv",
        "the fused projection is clipped before its bias is added",
        "invented",
        "clip-biases",
        operations=unwired(clip_before_bias),
    ),
    _fault(
        "qk-ln-as-rms",
        "attn.q_ln",
        "the norms of queries and keys do not take the mean off",
        "invented",
        "qk-ln",
        operations=unwired(rms_query_key_norm),
    ),
    _fault(
        "qk-ln-ignored",
        "attn.q_ln",
        "q_ln and k_ln are loaded and not used",
        "https://github.com/ggml-org/ggml/pull/499",
        "qk-ln",
        operations=skip_norms("q_ln", "k_ln"),
    ),
    _fault(
        "qk-ln-on-queries-only",
        "attn.k_ln",
        "k_ln is loaded and not used",
        "invented",
        "qk-ln",
        operations=skip_norms("k_ln"),
    ),
    _fault(
        "qk-ln-per-head",
        "attn.q_ln",
        "queries and keys are normalised head by head instead of over the full width",
        "invented",
        "qk-ln",
        operations=unwired(per_head_norm),
    ),
    _fault(
        "softmax-scale-ignored",
        "attn.context",
        "softmax_scale is ignored in favour of 1/sqrt(head_dim)",
        _VLLM,
        "softmax-scale",
        config=_field(softmax_scale=None),
    ),
    _fault(
        "softmax-scale-of-model",
        "attn.context",
        "the scale is 1/sqrt(d_model) instead of 1/sqrt(head_dim)",
        "transformers' docstring of softmax_scale says 1/sqrt(hidden_size)",
        "trained",
        operations=_scale(lambda config: float(config.d_model) ** -0.5),
    ),
    _fault(
        "softmax-scale-absent",
        "attn.context",
        "q.k is not scaled",
        "invented",
        "trained",
        operations=_scale(lambda config: 1.0),
    ),
    _fault(
        "softmax-scale-twice",
        "attn.context",
        "q is scaled, and so is q.k",
        "invented",
        "trained",
        operations=_scale(lambda config: config.scale**2),
    ),
    _fault(
        "softmax-scale-inverted",
        "attn.context",
        "q.k is divided by softmax_scale",
        "invented",
        "softmax-scale",
        operations=_scale(lambda config: 1.0 / config.scale),
    ),
    _fault(
        "logit-scale-ignored",
        "logits",
        "logit_scale is ignored",
        _TRANSFORMERS,
        "logit-scale",
        config=_field(logit_scale=None),
    ),
    _fault(
        "logit-scale-divides",
        "logits",
        "logits are divided by logit_scale",
        "invented",
        "logit-scale",
        config=lambda config: replace(config, logit_scale=1.0 / config.logit_scale),
    ),
    _fault(
        "biases-ignored",
        "norm_1",
        "no_bias: false is not honoured: biases are loaded and not added",
        _TRANSFORMERS,
        "biases",
        operations=without_bias("linear", "norm"),
    ),
    _fault(
        "linear-biases-ignored",
        "attn.Wqkv",
        "the biases of the linear layers are loaded and not added",
        "https://github.com/mlc-ai/mlc-llm/pull/460",
        "biases",
        operations=without_bias("linear"),
    ),
    _fault(
        "biases-on-every-rank",
        "attn.out_proj",
        "two tensor-parallel ranks both add the bias before their results are summed",
        "invented",
        "biases",
        operations=unwired(bias_on_every_rank),
    ),
    _fault(
        "up-proj-bias-after-gelu",
        "ffn.up_proj",
        "the bias of up_proj is added after the activation",
        "invented",
        "biases",
        operations=unwired(bias_after_activation),
    ),
    _fault(
        "biases-taken-for-absent",
        "load",
        "no_bias is taken to be true, so that the biases of the checkpoint have no place",
        "https://github.com/mlc-ai/mlc-llm/pull/460",
        "biases",
        config=_field(no_bias=True),
    ),
    _fault(
        "expansion-ratio-always-4",
        "load",
        "expansion_ratio is taken to be 4 whatever the config says",
        _TRANSFORMERS,
        "expansion-2",
        config=_field(expansion_ratio=4),
    ),
    _fault(
        "multi-query-taken-for-multi-head",
        "load",
        "attn_type is not honoured: Wqkv is expected to have as many keys as queries",
        _TRANSFORMERS,
        "multi-query",
        config=lambda config: replace(
            config, attn_type="multihead_attention", kv_n_heads=config.n_heads
        ),
    ),
    _fault(
        "key-heads-in-turn",
        "attn.context",
        "query head i uses key head i modulo their number instead of i divided by the group",
        "invented",
        "grouped-query",
        operations=heads_in_turn,
    ),
    _fault(
        "key-heads-as-one",
        "attn.context",
        "grouped attention runs as multi-query: every head uses the first key head",
        "https://github.com/mosaicml/llm-foundry/pull/756",
        "grouped-query",
        operations=first_kv_head,
    ),
    _fault(
        "untied-head-ignored",
        "logits",
        "logits come from the token embedding although there is an lm_head",
        "https://github.com/mosaicml/llm-foundry/pull/728",
        "untied",
        weights=_head_of_the_embedding,
    ),
    _fault(
        "layer-norm-epsilon-ignored",
        "norm_1",
        "the epsilon of the config, 1e-6, is taken to be 1e-5",
        "invented",
        "epsilon-1e-6",
        config=_field(layer_norm_epsilon=1e-5),
    ),
    _fault(
        "layernorm-for-rmsnorm",
        "norm_1",
        "norm_type rmsnorm is not honoured: the mean is taken off",
        _TRANSFORMERS,
        "rmsnorm",
        config=lambda config: replace(config, norm_type="low_precision_layernorm", no_bias=True),
    ),
)
