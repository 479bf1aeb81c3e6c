"""One block as a graph of small steps, each judged from what came before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from reference import arithmetic, original
from reference.arithmetic import compute_dtype, rounded
from reference.attention import attend
from reference.config import MPTConfig
from reference.norm import norm
from reference.orders import Order

INPUT = "input"
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One tap and the taps that it is computed from; ``input`` is the stream into the block."""

    tap: str
    inputs: tuple[str, ...]


def block_steps(config: MPTConfig, order: Order) -> tuple[Step, ...]:
    """Return the steps of a block, in an order in which they can run.

    Where an order fuses an addition or an activation, the fused tap is computed from what went into
    the fused group, because the value between was never rounded. The tap in between remains a step
    of its own, which nothing else depends on.
    """
    context: tuple[str, ...] = ("attn.Wqkv",)
    norms: tuple[Step, ...] = ()
    if config.qk_ln:
        context = ("attn.Wqkv", "attn.q_ln", "attn.k_ln")
        norms = (Step("attn.q_ln", ("attn.Wqkv",)), Step("attn.k_ln", ("attn.Wqkv",)))
    fused = order.residual == "fused" and not order.native
    active = order.activation == "fused" and not order.native
    return (
        Step("norm_1", (INPUT,)),
        Step("attn.Wqkv", ("norm_1",)),
        *norms,
        Step("attn.context", context),
        Step("attn.out_proj", ("attn.context",)),
        Step("attn.residual", (INPUT, "attn.context" if fused else "attn.out_proj")),
        Step("norm_2", ("attn.residual",)),
        Step("ffn.up_proj", ("norm_2",)),
        Step("ffn.act", ("norm_2" if active else "ffn.up_proj",)),
        Step("ffn.down_proj", ("ffn.act",)),
        Step("output", ("attn.residual", "ffn.act" if fused else "ffn.down_proj")),
    )


def run_step(
    config: MPTConfig, order: Order, weights: Weights, tap: str, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Evaluate one step of a block.

    Parameters
    ----------
    config, order, weights
        What to compute, how, and with which tensors of the block.
    tap
        One of `block_steps`.
    inputs
        At least the taps that the step names, (batch, sequence, features) in any type; widened.

    Returns
    -------
    Tensor
        (batch, sequence, features) in the compute type, rounded to storage.

    Raises
    ------
    ValueError
        No such tap, or an input that is missing or of another width.
    """
    step = next((s for s in block_steps(config, order) if s.tap == tap), None)
    if step is None:
        known = ", ".join(s.tap for s in block_steps(config, order))
        raise ValueError(f"tap: expected one of {known}, found {tap!r}")
    missing = [name for name in step.inputs if name not in inputs]
    if missing:
        raise ValueError(f"{tap}: needs {', '.join(step.inputs)}; missing {', '.join(missing)}")
    dtype = compute_dtype(order)
    values = [inputs[name].to(dtype) for name in step.inputs]
    for name, value in zip(step.inputs, values, strict=True):
        width = tap_width(config, name)
        if value.ndim != 3 or value.shape[-1] != width:
            found = tuple(value.shape)
            raise ValueError(f"{tap}: expected {name} of shape (b, s, {width}), found {found}")
    return _EVALUATE[tap](_Part(config, order, weights), values)


def tap_width(config: MPTConfig, tap: str) -> int:
    """Return the number of features of a tap."""
    widths = {
        "attn.Wqkv": config.qkv_rows,
        "attn.k_ln": config.kv_dim,
        "ffn.up_proj": config.hidden_dim,
        "ffn.act": config.hidden_dim,
        "logits": config.vocab_size,
    }
    return widths.get(tap, config.d_model)


@dataclass(frozen=True)
class _Part:
    config: MPTConfig
    order: Order
    weights: Weights

    def norm(self, name: str, x: Tensor, *, rms: bool) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        evaluate = original.norm if self.order.native else norm
        return evaluate(x, weight, bias, self.config.layer_norm_epsilon, self.order, rms=rms)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear layer, not yet rounded."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        evaluate = original.linear if self.order.native else arithmetic.linear
        return evaluate(x, weight, bias, self.order)

    def rounded(self, x: Tensor) -> Tensor:
        return rounded(x, self.order)

    def gelu(self, x: Tensor) -> Tensor:
        evaluate = original.gelu if self.order.native else arithmetic.gelu
        return self.rounded(evaluate(x, self.order))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return original.add(x, y, self.order) if self.order.native else self.rounded(x + y)


def _norm_1(part: _Part, inputs: list[Tensor]) -> Tensor:
    return part.norm("norm_1", inputs[0], rms=part.config.is_rms)


def _qkv(part: _Part, inputs: list[Tensor]) -> Tensor:
    fused = part.rounded(part.linear("attn.Wqkv", inputs[0]))
    clip = part.config.clip_qkv
    if clip is None:
        return fused
    # Rounding is monotone, so that clamping before it or after it is the same.
    return part.rounded(fused.clamp(-clip, clip))


def _q_ln(part: _Part, inputs: list[Tensor]) -> Tensor:
    width = part.config.d_model
    return part.norm("attn.q_ln", inputs[0][..., :width], rms=False)


def _k_ln(part: _Part, inputs: list[Tensor]) -> Tensor:
    width = part.config.d_model
    return part.norm("attn.k_ln", inputs[0][..., width : width + part.config.kv_dim], rms=False)


def _context(part: _Part, inputs: list[Tensor]) -> Tensor:
    config = part.config
    q, k, v = inputs[0].split([config.d_model, config.kv_dim, config.kv_dim], dim=-1)
    if config.qk_ln:
        q, k = inputs[1], inputs[2]
    q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
    return attend(config, part.order, q, k, v)


def _out_proj(part: _Part, inputs: list[Tensor]) -> Tensor:
    return part.rounded(part.linear("attn.out_proj", inputs[0]))


def _residual(part: _Part, inputs: list[Tensor]) -> Tensor:
    stream, branch = inputs
    if part.order.residual == "fused" and not part.order.native:
        branch = part.linear("attn.out_proj", branch)
    return part.add(stream, branch)


def _norm_2(part: _Part, inputs: list[Tensor]) -> Tensor:
    return part.norm("norm_2", inputs[0], rms=part.config.is_rms)


def _up_proj(part: _Part, inputs: list[Tensor]) -> Tensor:
    return part.rounded(part.linear("ffn.up_proj", inputs[0]))


def _act(part: _Part, inputs: list[Tensor]) -> Tensor:
    value = inputs[0]
    if part.order.activation == "fused" and not part.order.native:
        value = part.linear("ffn.up_proj", value)
    return part.gelu(value)


def _down_proj(part: _Part, inputs: list[Tensor]) -> Tensor:
    return part.rounded(part.linear("ffn.down_proj", inputs[0]))


def _output(part: _Part, inputs: list[Tensor]) -> Tensor:
    stream, branch = inputs
    if part.order.residual == "fused" and not part.order.native:
        branch = part.linear("ffn.down_proj", branch)
    return part.add(stream, branch)


_EVALUATE: dict[str, Callable[[_Part, list[Tensor]], Tensor]] = {
    "norm_1": _norm_1,
    "attn.Wqkv": _qkv,
    "attn.q_ln": _q_ln,
    "attn.k_ln": _k_ln,
    "attn.context": _context,
    "attn.out_proj": _out_proj,
    "attn.residual": _residual,
    "norm_2": _norm_2,
    "ffn.up_proj": _up_proj,
    "ffn.act": _act,
    "ffn.down_proj": _down_proj,
    "output": _output,
}
