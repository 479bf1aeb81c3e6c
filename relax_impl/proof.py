"""Proof, by content, that every checkpoint tensor arrives in its parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relax_impl.config import MPTConfig
from relax_impl.layout import Layout
from relax_impl.loader import WeightMap, apply, mapping, parameter_shapes
from relax_impl.topology import topology

Ids = NDArray[np.int64]
BASE = 256
"""Digits 1..256 are exact in every storage dtype; 0 is left to padding."""
LIMIT = 1 << 24
"""Elements above which the proof is made on the shrunk model."""
PADDING = -1
FOREIGN = -2
IN_OTHERS_TOO = "found in other parameters too"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one tensor.

    `found_in` names all parameters that hold any element of it; `problem` is None when they are its
    own parameter alone, and every element is there once, in its place.
    """

    tensor: str
    found_in: tuple[str, ...]
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Proof:
    """Result of `prove`: one finding per tensor, and one per parameter that is no tensor's.

    `elements` were planted; `shrunk` says whether in the model's own shapes or in smaller ones.
    """

    findings: tuple[Finding, ...]
    elements: int
    shrunk: bool

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that contradict the map."""
        return tuple(finding for finding in self.findings if finding.problem)

    @property
    def holds(self) -> bool:
        """Whether something was planted and all of it was found in place."""
        return bool(self.findings) and self.elements > 0 and not self.problems


def shrunk(config: MPTConfig) -> MPTConfig:
    """Return a model with the same tensors and functions, but tiny shapes.

    Layers, options, query heads per key head and the expansion ratio stay; widths that differ stay
    different.
    """
    group = config.n_heads // config.kv_n_heads
    kv = min(config.kv_n_heads, 2)
    heads = kv * group
    dim = 3
    while (heads * dim * config.expansion_ratio) % 1:
        dim += 1
    return dataclasses.replace(
        config,
        d_model=heads * dim,
        n_heads=heads,
        kv_n_heads=kv,
        vocab_size=37,
        max_seq_len=41,
    )


def _index(place: tuple[int, ...], layout: Layout, matrix: tuple[int, ...]) -> Ids:
    """Flat index, within its tensor, of what each stored element must be; -1 in padding.

    Written from the definition of the layouts, not with `Layout.store`, which it is to judge.
    """
    if len(matrix) == 1 or not layout.width:
        return np.arange(math.prod(matrix), dtype=np.int64).reshape(matrix)
    panel, column, lane = np.indices(place, dtype=np.int64)
    row = panel * layout.width + lane
    return np.where(row < matrix[0], row * matrix[1] + column, PADDING)


def _decode(passes: list[Any]) -> Ids:
    """Ids from their digits; FOREIGN where a value is no digit."""
    ids = np.zeros(passes[0].shape, np.int64)
    padding = np.ones(ids.shape, bool)
    foreign = np.zeros(ids.shape, bool)
    for power, digits in enumerate(passes):
        values = digits.astype(np.float64)
        padding &= values == 0
        foreign |= ~((values >= 1) & (values <= BASE) & (values == np.floor(values)))
        safe = np.where(foreign, 1, values)
        ids += (safe.astype(np.int64) - 1) * BASE**power
    ids[foreign] = FOREIGN
    ids[padding] = PADDING
    return ids


def _planted(
    weight_map: WeightMap,
    shapes: Mapping[str, tuple[int, ...]],
    offsets: Mapping[str, int],
    name: str,
    dtype: str,
    digits: int,
) -> Ids:
    """Ids that the map writes into one parameter; the tensors exist one parameter at a time."""

    def read(power: int, tensor: str) -> Any:
        ids = np.arange(math.prod(shapes[tensor]), dtype=np.int64) + offsets[tensor]
        return (ids // BASE**power % BASE + 1).astype(np.float32).reshape(shapes[tensor])

    return _decode(
        [apply(weight_map, name, partial(read, power), dtype) for power in range(digits)]
    )


def _problem(name: str, ids: Ids, expected: Ids, offset: int, size: int) -> str | None:
    """Say what is wrong with the content of a parameter, if anything is."""
    if ids.shape != expected.shape:
        return f"expected shape {expected.shape}, found {ids.shape}"
    wanted = np.where(expected == PADDING, PADDING, expected + offset)
    wrong = int((ids != wanted).sum())
    if not wrong:
        return None
    own = (ids >= offset) & (ids < offset + size)
    if not own.any():
        return "holds nothing of its tensor"
    if len(np.unique(ids[own])) == size:
        return f"all elements are there, {wrong} of {size} in another place"
    return f"{wrong} of {size} elements are not in place"


def prove(config: MPTConfig, weight_map: WeightMap | None = None, dtype: str = "float32") -> Proof:
    """Plant a different content in every element and look for it in all parameters.

    Each element of each tensor gets a number of its own, written in digits that survive the
    conversion to `dtype`. The map is applied as in loading, and the numbers are read back from
    every parameter: a tensor must be in its own parameter, whole, each element in its place, and
    nowhere else. Transposed, swapped, repeated, dropped, shifted and replaced tensors all show.

    Parameters
    ----------
    config
        The model. Above `LIMIT` elements the proof is made on `shrunk` shapes, with the same names
        and the same functions; otherwise in the model's own shapes.
    weight_map
        The map to judge, by default `mapping`.
    dtype
        Storage dtype of the parameters.

    Returns
    -------
    Proof
        Holds or not, with a finding per tensor.
    """
    weight_map = weight_map or mapping(config)
    is_shrunk = sum(math.prod(s) for s in topology(config).values()) > LIMIT
    model = shrunk(config) if is_shrunk else config
    shapes = topology(model)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    starts = np.concatenate([[0], np.cumsum(list(sizes.values()))])
    offsets = dict(zip(shapes, starts[:-1].tolist(), strict=True))
    elements = int(starts[-1])
    digits = max(1, math.ceil(math.log(elements, BASE)))
    places = parameter_shapes(model, weight_map.layout)
    names = list(shapes)
    found: dict[str, list[str]] = {name: [] for name in names}
    problems: dict[str, str] = {}
    for name in dict.fromkeys([*places, *weight_map.param_map]):
        if name not in weight_map.param_map:
            problems[name] = "parameter without a source"
            continue
        if name not in places:
            problems[name] = "no such parameter"
            continue
        try:
            ids = _planted(weight_map, shapes, offsets, name, dtype, digits)
        except Exception as error:
            problems[name] = f"mapping it failed: {type(error).__name__}: {error}"
            continue
        real = ids[ids >= 0]
        held = np.unique(np.searchsorted(starts, real[real < elements], side="right") - 1)
        for tensor in held:
            found[names[tensor]].append(name)
        if name in shapes:
            expected = _index(places[name], weight_map.layout, shapes[name])
            problem = _problem(name, ids, expected, offsets[name], sizes[name])
            if problem:
                problems[name] = problem
    findings = []
    for name in names:
        problem = problems.pop(name, None)
        if problem is None and found[name] != [name]:
            problem = IN_OTHERS_TOO
        findings.append(Finding(name, tuple(found[name]), problem))
    findings += [Finding(name, (), problem) for name, problem in problems.items()]
    return Proof(tuple(findings), elements, is_shrunk)
