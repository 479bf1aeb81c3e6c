"""The library of faults, by name."""

from __future__ import annotations

import difflib
from functools import lru_cache

from harness.errors import BadInput
from harness.faults.model import Fault, Planted


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
        config,
        equivalent,
        fused,
        mask,
        norm,
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
    return Planted(fault, int(where))
