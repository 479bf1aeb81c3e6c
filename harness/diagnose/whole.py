"""What a model that reads its config wrongly says: templates of the logits, where there is no tap.

A subject that offers no `block` shows its logits alone. A field that is ignored, or read as
something else, still makes an MPT, which the reference can run: its logits are the template. Two
such faults together are a template of their own, since a loader that drops one field drops others
with it. Faults of an operation are not looked for here: they have no config that means them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np

from harness.diagnose.deployed import logits_of
from harness.diagnose.match import Template
from harness.measure.oracle import Oracle, Read, flat
from harness.measure.run import Case
from harness.measure.statistics import Float
from harness.subjects.protocol import Rounding

AS_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qk-ln-ignored": {"qk_ln": False},
        "biases-ignored": {"no_bias": True},
        # Learned positions go with it: the original has either these or the bias.
        "alibi-always-on": {"alibi": True},
    }
)
"""Faults that are planted in operations and mean a field all the same."""


def misread(config: Any) -> dict[str, dict[str, Any]]:
    """Return the faults of the library that are another config, with the fields they change.

    Parameters
    ----------
    config
        Parsed by the port's room, of whose config the library's faults are made.
    """
    from harness.faults.library import library

    plain = asdict(config)
    found: dict[str, dict[str, Any]] = {}
    for fault in library().values():
        if fault.equivalent or fault.config is None:
            continue
        try:
            changed = asdict(fault.config(config))
        except Exception:
            # A field that this config leaves out cannot be misread.
            continue
        fields = {name: value for name, value in changed.items() if value != plain[name]}
        if fields:
            found[fault.name] = fields
    for name, meant in AS_FIELDS.items():
        if any(plain[field] != value for field, value in meant.items()):
            found.setdefault(name, dict(meant))
    return found


def whole_templates(
    oracle: Oracle, case: Case, golden: Float, config: Any, read: Read
) -> Iterator[Template]:
    """Yield the logits of every misread config, and of every two of them.

    Parameters
    ----------
    oracle
        Knows the reference's config and how weights are stored.
    golden
        The logits as they should be.
    config
        Parsed by the port's room.
    read
        Original tensor name to array.
    """
    acting: dict[str, dict[str, Any]] = {}
    for name, fields in misread(config).items():
        made = _template(name, oracle, case, fields, read)
        if made is None or np.array_equal(made.expected, golden):
            continue
        acting[name] = fields
        yield made
    for one, other in combinations(acting, 2):
        if acting[one].keys() & acting[other].keys():
            continue
        both = acting[one] | acting[other]
        made = _template(f"{one} and {other}", oracle, case, both, read)
        if made is not None:
            yield made


def _template(
    name: str, oracle: Oracle, case: Case, fields: Mapping[str, Any], read: Read
) -> Template | None:
    """Return the logits with some fields changed; ``None`` if the weights do not fit."""
    known = {key: value for key, value in fields.items() if hasattr(oracle.config, key)}
    if known.keys() != fields.keys():
        return None
    try:
        other = Oracle(
            replace(oracle.config, **known),
            read,
            storage=oracle.storage,
            rounding=Rounding(),
            device=oracle.device,
        )
        # The rounding that the subject declares is that of the model it was taken for.
        other.orders = oracle.orders
        expected = flat(logits_of(other, other.golden, case))
    except Exception:
        # Weights that another config wants and that are not there, or not of that shape.
        return None

    def orders() -> tuple[Float, ...]:
        return tuple(flat(logits_of(other, order, case)) for order in other.orders)

    return Template(name, expected, orders)
