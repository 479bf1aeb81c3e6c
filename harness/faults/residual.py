"""Faults of the residual stream: what is added to what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm.relax.frontend.nn import op

from harness.faults.model import Fault

Mutation = Callable[[Any], Any]


def _wired(attention_onto: str, mlp_from: str, mlp_onto: str) -> Mutation:
    """Return a mutation of the wiring.

    Parameters
    ----------
    attention_onto, mlp_onto
        What a sub-module's result is added to: a tap, ``"hidden"`` (the block's input) or nothing.
    mlp_from
        What norm_2 reads.
    """

    def mutate(operations: Any) -> Any:
        def block(ops: Any, block: Any, hidden: Any, tap: Any) -> Any:
            seen: dict[str, Any] = {"hidden": hidden, "": None}

            def keep(name: str, value: Any) -> Any:
                seen[name] = tap(name, value)
                return seen[name]

            def residual(stream: Any, update: Any) -> Any:
                onto = seen[attention_onto if "norm_2" not in seen else mlp_onto]
                return update if onto is None else ops.residual(onto, update)

            def norm(x: Any, norm: Any) -> Any:
                return ops.norm(seen[mlp_from] if norm is block.norm_2 else x, norm)

            return operations.block(replace(ops, residual=residual, norm=norm), block, hidden, keep)

        return replace(operations, block=block)

    return mutate


def _sum(change: Callable[[Any, Any], Any]) -> Mutation:
    """Return a mutation of every addition of the blocks, in float32; ``change(stream, update)``."""

    def mutate(operations: Any) -> Any:
        def residual(x: Any, update: Any) -> Any:
            wide = change(op.astype(x, "float32"), op.astype(update, "float32"))
            return op.astype(wide, x.dtype)

        return replace(operations, residual=residual)

    return mutate


def _fault(name: str, summary: str, operations: Mutation, tap: str = "attn.residual") -> Fault:
    return Fault(name, "residual", "invented", "trained", tap, summary, operations=operations)


FAULTS: tuple[Fault, ...] = (
    _fault(
        "residual-parallel",
        "the MLP reads the block's input, as GPT-NeoX's does",
        _wired("hidden", "hidden", "attn.residual"),
        "norm_2",
    ),
    _fault(
        "residual-attention-absent",
        "the attention's result replaces the stream",
        _wired("", "attn.residual", "attn.residual"),
    ),
    _fault(
        "residual-mlp-absent",
        "the MLP's result replaces the stream",
        _wired("hidden", "attn.residual", ""),
        "output",
    ),
    _fault(
        "residual-post-norm",
        "the attention is added to the normalised stream",
        _wired("norm_1", "attn.residual", "attn.residual"),
    ),
    _fault(
        "residual-mlp-post-norm",
        "the MLP is added to the normalised stream",
        _wired("hidden", "attn.residual", "norm_2"),
        "output",
    ),
    _fault(
        "residual-mlp-onto-input",
        "the MLP is added to the block's input, so that the attention is lost",
        _wired("hidden", "attn.residual", "hidden"),
        "output",
    ),
    _fault("residual-minus", "updates are taken off", _sum(lambda x, u: x - u)),
    _fault("residual-stream-twice", "the stream is added twice", _sum(lambda x, u: x + x + u)),
    _fault("residual-update-half", "updates are halved", _sum(lambda x, u: x + u * 0.5)),
    _fault(
        "residual-update-1-percent", "updates are 1 % too large", _sum(lambda x, u: x + u * 1.01)
    ),
)
