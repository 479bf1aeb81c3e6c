"""Wrong wirings of a block: what bypasses a norm, a bias or a key head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.relax.frontend.nn import Tensor, op


class Altered:
    """A linear layer or norm of which something is taken to be different."""

    def __init__(self, module: Any, **different: Any) -> None:
        self._module = module
        self.__dict__.update(different)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def without_bias(*fields: str) -> Callable[[Any], Any]:
    """Return a mutation that overlooks the biases of all linear layers or norms."""

    def blind(function: Any) -> Any:
        return lambda x, module: function(x, Altered(module, bias=None))

    def mutate(operations: Any) -> Any:
        return replace(operations, **{f: blind(getattr(operations, f)) for f in fields})

    return mutate


def unwired(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """Return a mutation of the block; ``change`` returns its operations, given those and it."""

    def mutate(operations: Any) -> Any:
        def block(ops: Any, block: Any, hidden: Any, tap: Any) -> Any:
            return operations.block(change(ops, block), block, hidden, tap)

        return replace(operations, block=block)

    return mutate


def skip_norms(*names: str) -> Callable[[Any], Any]:
    """Return a mutation that passes by some norms of the attention."""

    def change(ops: Any, block: Any) -> Any:
        skipped = [getattr(block.attn, name) for name in names]
        return replace(
            ops, norm=lambda x, norm: x if any(norm is s for s in skipped) else ops.norm(x, norm)
        )

    return unwired(change)


def rms_query_key_norm(ops: Any, block: Any) -> Any:
    """Normalise queries and keys without taking off the mean."""
    concerned = (block.attn.q_ln, block.attn.k_ln)
    return replace(
        ops,
        norm=lambda x, norm: ops.norm(
            x, Altered(norm, is_rms=True) if any(norm is c for c in concerned) else norm
        ),
    )


def clip_after_norm(ops: Any, block: Any) -> Any:
    """Clip queries and keys after their norms, and values where they are split off."""
    limit = block.config.clip_qkv
    concerned = (block.attn.q_ln, block.attn.k_ln)

    def norm(x: Any, norm: Any) -> Any:
        result = ops.norm(x, norm)
        return ops.clip(result, limit) if any(norm is c for c in concerned) else result

    def split(qkv: Any, config: Any) -> Any:
        q, k, v = ops.split(qkv, config)
        return q, k, ops.clip(v, limit)

    return replace(ops, norm=norm, split=split, clip=lambda x, limit: x)


def clip_before_bias(ops: Any, block: Any) -> Any:
    """Clip the fused projection before its bias is added."""

    def linear(x: Any, module: Any) -> Any:
        if module is not block.attn.Wqkv:
            return ops.linear(x, module)
        return ops.clip(ops.linear(x, Altered(module, bias=None)), block.config.clip_qkv) + (
            module.bias
        )

    return replace(ops, linear=linear, clip=lambda x, limit: x)


def bias_on_every_rank(ops: Any, block: Any) -> Any:
    """Add the bias of a projection into the stream on both of two tensor-parallel ranks."""
    concerned = (block.attn.out_proj, block.ffn.down_proj)

    def linear(x: Any, module: Any) -> Any:
        result = ops.linear(x, module)
        return result + module.bias if any(module is c for c in concerned) else result

    return replace(ops, linear=linear)


def bias_after_activation(ops: Any, block: Any) -> Any:
    """Add the bias of up_proj after the activation."""
    up = block.ffn.up_proj

    def linear(x: Any, module: Any) -> Any:
        return ops.linear(x, Altered(module, bias=None) if module is up else module)

    return replace(ops, linear=linear, activation=lambda x: ops.activation(x) + up.bias)


def per_head_norm(ops: Any, block: Any) -> Any:
    """Normalise q and k head by head, with the gains of the full width."""

    class Plain:
        """A norm with gain 1."""

        is_rms, bias = False, None

        def __init__(self, norm: Any, dim: int, dtype: str) -> None:
            self.epsilon = norm.epsilon
            self.weight = op.astype(Tensor.from_const(np.ones(dim, np.float32)), dtype)

    def norm(x: Any, module: Any) -> Any:
        if module not in (block.attn.q_ln, block.attn.k_ln):
            return ops.norm(x, module)
        b, s, width = x.shape
        dim = block.config.head_dim
        # Kernels of norms take three axes.
        heads = op.reshape(x, (b, s * (width // dim), dim))
        flat = op.reshape(ops.norm(heads, Plain(module, dim, x.dtype)), (b, s, width))
        flat = flat * module.weight
        return flat if module.bias is None else flat + module.bias

    return replace(ops, norm=norm)


def heads_in_turn(operations: Any) -> Any:
    """Let query head i use key head i modulo the number of key heads."""

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        groups = config.n_heads // config.kv_n_heads
        every = replace(config, kv_n_heads=config.n_heads)
        return operations.attention(
            q, op.concat([k] * groups, dim=2), op.concat([v] * groups, dim=2), slopes, every
        )

    return replace(operations, attention=attention)


def first_kv_head(operations: Any) -> Any:
    """Serve every query head from the first key head."""

    def attention(q: Any, k: Any, v: Any, slopes: Any, config: Any) -> Any:
        heads = config.kv_n_heads
        k, v = (op.split(x, heads, axis=2)[0] for x in (k, v))
        return operations.attention(q, k, v, slopes, replace(config, kv_n_heads=1))

    return replace(operations, attention=attention)
