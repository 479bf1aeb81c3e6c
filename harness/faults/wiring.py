"""Wrong wirings of a block: what bypasses a norm, a bias or a key head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.relax.frontend.nn import Tensor, op


class _NoBias:
    """A linear layer or norm whose bias is overlooked."""

    bias = None

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def without_bias(*fields: str) -> Callable[[Any], Any]:
    """Return a mutation that overlooks the biases of all linear layers or norms."""

    def blind(function: Any) -> Any:
        return lambda x, module: function(x, _NoBias(module))

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
