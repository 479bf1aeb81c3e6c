"""The two ends of the model: ids to the first stream, and the last stream to logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference import arithmetic, original
from reference.arithmetic import compute_dtype, rounded
from reference.config import MPTConfig
from reference.norm import norm
from reference.orders import Order
from reference.steps import Step, Weights

HEAD_STEPS = (
    Step("transformer.norm_f", ("hidden",)),
    Step("logits", ("transformer.norm_f",)),
)


def embed_steps(config: MPTConfig) -> tuple[Step, ...]:
    """Return the steps of the embedding; ``hidden`` is the stream into block 0."""
    tables: tuple[str, ...] = ("transformer.wte",)
    if config.has_wpe:
        tables = ("transformer.wte", "transformer.wpe")
    return (*(Step(tap, ("input_ids",)) for tap in tables), Step("hidden", tables))


def head_steps(config: MPTConfig, order: Order) -> tuple[Step, ...]:
    """Return the steps of the head; its input is named ``hidden``."""
    return HEAD_STEPS


def embed(config: MPTConfig, order: Order, weights: Weights, ids: Tensor) -> dict[str, Tensor]:
    """Look up tokens, and positions where they are learned.

    Parameters
    ----------
    ids
        Integers (batch, sequence).

    Returns
    -------
    dict
        ``transformer.wte``, ``transformer.wpe`` if there is one, and ``hidden``: their sum with
        ``embedding_fraction`` applied. Each (batch, sequence, d_model).

    Raises
    ------
    ValueError
        An id outside the vocabulary, or more tokens than learned positions.
    """
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"ids: expected shape (batch, sequence), found {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"ids: expected 0 to {config.vocab_size - 1}, found {found}")
    dtype = compute_dtype(order)
    rows = weights["transformer.wte.weight"][ids.long()].to(dtype)
    taps = {"transformer.wte": rounded(rows, order)}
    if config.has_wpe:
        if ids.shape[1] > config.max_seq_len:
            limit = f"at most max_seq_len {config.max_seq_len} tokens"
            raise ValueError(f"ids: expected {limit}, found {ids.shape[1]}")
        rows = weights["transformer.wpe.weight"][: ids.shape[1]].to(dtype)
        taps["transformer.wpe"] = rounded(rows, order).expand(*ids.shape, -1)
    return taps | {"hidden": embed_step(config, order, "hidden", taps)}


def embed_step(config: MPTConfig, order: Order, tap: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Evaluate ``hidden``, the stream into block 0, from the looked-up rows."""
    if tap != "hidden":
        raise ValueError(f"tap: expected 'hidden', found {tap!r}")
    dtype = compute_dtype(order)
    hidden = inputs["transformer.wte"].to(dtype)
    if config.has_wpe:
        hidden = rounded(hidden + inputs["transformer.wpe"].to(dtype), order)
    fraction = config.embedding_fraction
    if fraction != 1:
        # Nothing but a smaller gradient in training; in inference only its rounding is left.
        kept = rounded(hidden * fraction, order)
        hidden = rounded(kept + rounded(hidden * (1 - fraction), order), order)
    return hidden


def head_step(
    config: MPTConfig, order: Order, weights: Weights, tap: str, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Evaluate one step of the head from given inputs; see `reference.steps.run_step`."""
    step = next((s for s in HEAD_STEPS if s.tap == tap), None)
    if step is None:
        known = ", ".join(s.tap for s in HEAD_STEPS)
        raise ValueError(f"tap: expected one of {known}, found {tap!r}")
    if step.inputs[0] not in inputs:
        raise ValueError(f"{tap}: needs {step.inputs[0]}; missing")
    x = inputs[step.inputs[0]].to(compute_dtype(order))
    if x.shape[-1] != config.d_model:
        expected = f"(b, s, {config.d_model})"
        raise ValueError(f"{tap}: expected {step.inputs[0]} of shape {expected}, found {x.shape}")
    if tap == "transformer.norm_f":
        weight = weights["transformer.norm_f.weight"]
        bias = weights.get("transformer.norm_f.bias")
        evaluate = original.norm if order.native else norm
        return evaluate(x, weight, bias, config.layer_norm_epsilon, order, rms=config.is_rms)
    return _logits(config, order, weights, x)


def head(config: MPTConfig, order: Order, weights: Weights, hidden: Tensor) -> dict[str, Tensor]:
    """Return ``transformer.norm_f`` and ``logits`` of the last stream (b, s, d_model)."""
    taps = {"hidden": hidden}
    for step in HEAD_STEPS:
        taps[step.tap] = head_step(config, order, weights, step.tap, taps)
    del taps["hidden"]
    return taps


def _logits(config: MPTConfig, order: Order, weights: Weights, x: Tensor) -> Tensor:
    name = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    scale = config.logit_scale
    if order.native:
        logits = original.linear(x, weights[name], None, order)
        return logits if scale is None else original.times(logits, scale, order)
    logits = arithmetic.linear(x, weights[name], None, order)
    if scale is not None:
        if order.epilogue == "separate":
            logits = rounded(logits, order)
        logits = logits * scale
    return rounded(logits, order)
