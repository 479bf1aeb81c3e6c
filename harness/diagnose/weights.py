"""What the faults of the weight mapper make of the parameters that one sub-module reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from harness.faults.model import Planted
from harness.subjects.protocol import Array

Read = Callable[[str], Array]


def healthy_parameters(
    config: Any, prefix: str, names: tuple[str, ...], read: Read, dtype: str
) -> dict[str, Array]:
    """Return the parameters by their names relative to a part, as the subject should hold them."""
    from relax_impl.loader import apply, mapping

    plain = mapping(config)
    return {name: apply(plain, prefix + name, read, dtype) for name in names}


def faulty_parameters(
    config: Any,
    layer: int | None,
    names: tuple[str, ...],
    healthy: Mapping[str, Array],
    read: Read,
    dtype: str,
    *,
    only: frozenset[str] | None = None,
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield every fault of the mapper that reaches these parameters, with what it makes of them.

    A fault confined to another layer counts if it reaches this one too, as an exchange does.

    Parameters
    ----------
    config
        Parsed by the port's room.
    layer
        Block of the parameters; ``None`` outside the blocks.
    names, healthy
        Names relative to the part, and what they should hold.
    read
        Original tensor name to array.
    dtype
        Storage dtype.
    only
        Names of the faults that are asked for; all of them if ``None``.
    """
    from harness.faults.library import library
    from relax_impl.loader import apply, mapping

    plain = mapping(config)
    prefix = "" if layer is None else f"transformer.blocks.{layer}."
    full = [prefix + name for name in names]
    for fault in library().values():
        if (
            fault.weights is None
            or fault.equivalent
            or (only is not None and fault.name not in only)
        ):
            continue
        confined = range(config.n_layers) if fault.per_layer and layer is not None else ()
        seen: set[tuple[Any, ...]] = set()
        for planted in (Planted(fault), *(Planted(fault, at) for at in confined)):
            try:
                faulty = fault.weights(plain, config, planted.layer)
            except Exception:
                # A tensor that this config does not have cannot be mistreated.
                continue
            reach = tuple(
                (faulty.param_map[name], faulty.map_func[name] is not plain.map_func[name])
                for name in full
            )
            untouched = all(
                sources == plain.param_map[name] and not changed
                for name, (sources, changed) in zip(full, reach, strict=True)
            )
            if untouched or reach in seen:
                continue
            seen.add(reach)
            try:
                arrays = {name: apply(faulty, prefix + name, read, dtype) for name in names}
            except Exception:
                continue
            fits = all(arrays[name].shape == healthy[name].shape for name in names)
            if fits and not all(_same(arrays[name], healthy[name]) for name in names):
                yield fault.name, arrays


def _same(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True))
