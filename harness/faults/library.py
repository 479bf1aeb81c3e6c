"""The library of faults, by name."""

from __future__ import annotations

import difflib
from functools import lru_cache

from harness.errors import BadInput
from harness.faults.model import Fault, Planted

STRENGTHS: dict[str, tuple[str, ...]] = {
    "factor of the bias": ("alibi-twice", "alibi-1-percent", "alibi-before-scale"),
    "factor of the scores": (
        "softmax-scale-of-model",
        "softmax-scale-absent",
        "softmax-scale-twice",
    ),
    "factor of the updates": ("residual-update-half", "residual-update-1-percent"),
    "epsilon": ("norm-epsilon-1e-6", "norm-epsilon-1e-12", "norm-epsilon-1e-3"),
    "window": ("mask-window-64", "mask-window-500"),
    "dtype of the slopes": ("slopes-float16", "slopes-float16-subnormal", "slopes-bfloat16"),
    "dtype of the bias": ("bias-float16", "bias-bfloat16"),
    "dtype of the scores": ("scores-float16", "scores-bfloat16"),
    "dtype of the probabilities": ("probabilities-float16", "probabilities-bfloat16"),
    "grouping of half-precision sums": (
        "linear-accumulates-float16",
        "linear-adds-float16-of-32",
        "linear-adds-float16-halves",
    ),
    "matrix of the next layer": ("up-proj-next-layer", "down-proj-next-layer"),
}
"""Faults that are one mechanism in several strengths. At most three strengths of one count."""


@lru_cache(maxsize=1)
def library() -> dict[str, Fault]:
    """Return every fault by name, in order of area.

    Raises
    ------
    ValueError
        If two faults share a name.
    """
    from harness.faults import (
        activation,
        alibi,
        calls,
        config,
        equivalent,
        fused,
        mask,
        norm,
        paths,
        precision,
        residual,
        tokens,
        weights,
    )

    result: dict[str, Fault] = {}
    areas = (
        alibi,
        weights,
        fused,
        config,
        mask,
        norm,
        activation,
        residual,
        precision,
        tokens,
        paths,
        calls,
        equivalent,
    )
    for module in areas:
        for fault in module.FAULTS:
            if fault.name in result:
                raise ValueError(f"two faults are named {fault.name}")
            result[fault.name] = fault
    return result


def parse(text: str, n_layers: int) -> Planted:
    """Return the fault that ``NAME`` or ``NAME@LAYER`` names.

    Raises
    ------
    BadInput
        If there is no such fault or layer, or the fault is not one of a layer.
    """
    name, at, where = text.partition("@")
    fault = library().get(name)
    if fault is None:
        near = difflib.get_close_matches(name, library(), n=1)
        hint = f"did you mean {near[0]}?" if near else "`mpt-conform faults` lists all"
        raise BadInput("unknown fault", where="--fault", found=repr(name), hint=hint)
    if not at:
        return Planted(fault)
    if not where.isdigit() or int(where) >= n_layers:
        raise BadInput(
            "no such layer", where=f"--fault {text}", expected=f"0..{n_layers - 1}", found=where
        )
    if not fault.per_layer:
        raise BadInput("this fault cannot be confined to one layer", where=f"--fault {text}")
    if int(where) < fault.first_layer:
        raise BadInput(
            "this fault changes nothing there",
            where=f"--fault {text}",
            expected=f"{fault.first_layer} or a layer after it",
        )
    return Planted(fault, int(where))
