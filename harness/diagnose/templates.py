"""What every fault of the library makes of one tap, from the inputs that the subject had there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.diagnose.exhibit import Exhibit
from harness.diagnose.inquiry import Inquiry
from harness.diagnose.match import Template
from harness.diagnose.steps import HEALTHY, Steps, library_steps
from harness.diagnose.weights import faulty_parameters, healthy_parameters
from harness.measure.oracle import flat
from harness.measure.statistics import LARGEST, Float
from harness.measure.widening import converted
from harness.subjects.protocol import Array

PRECISION = "precision"


class _Stage:
    """Gives the functions of a part their weights, as the checkpoint has them."""

    def __init__(self, inquiry: Inquiry, prefix: str) -> None:
        from relax_impl.topology import topology

        self.inquiry, self.prefix = inquiry, prefix
        self.storage = inquiry.oracle.storage
        self.known = topology(inquiry.config)

    def names(self, steps: Steps, key: str) -> tuple[str, ...]:
        """Return the weights that a function reads."""
        return tuple(
            n for n in steps.arguments[steps.function[key]] if self.prefix + n in self.known
        )

    def weights(self, names: tuple[str, ...]) -> Mapping[str, Array]:
        inquiry = self.inquiry
        return healthy_parameters(inquiry.config, self.prefix, names, inquiry.read, self.storage)


class _Tap(_Stage):
    """Runs functions of a tap on the subject's own inputs."""

    def __init__(self, inquiry: Inquiry, seen: Exhibit) -> None:
        prefix = f"transformer.blocks.{seen.layer}." if seen.part == "block" else ""
        super().__init__(inquiry, prefix)
        self.seen = seen

    def run(self, steps: Steps, key: str, weights: Mapping[str, Array]) -> Float:
        seen = self.seen
        if seen.probe is None:
            return flat(steps.run(key, {**seen.inputs, **weights}))
        held = np.dtype(BY_NAME[self.storage].numpy)
        # The context is rounded as the subject rounds it: what underflows there underflows here.
        return seen.probe(lambda q, k, v: converted(steps.run(key, {"q": q, "k": k, "v": v}), held))

    def planted(self, steps: Steps, fault: str) -> Float | None:
        """Return the tap with a fault, or ``None`` where it wants weights that are not there."""
        weights = self.weights(self.names(steps, fault))
        if self.seen.probe is None and not steps.takes(fault, {**self.seen.inputs, **weights}):
            return None
        return self.run(steps, fault, weights)

    def as_it_is(self, steps: Steps, fault: str) -> Iterator[Template]:
        """Yield what the fault computes as a template, rather than what it changes."""
        expected = self.planted(steps, fault)
        if expected is not None and expected.shape == self.seen.golden.shape:
            yield Template(fault, expected)


def library_templates(
    inquiry: Inquiry, seen: Exhibit, only: frozenset[str] | None = None
) -> Iterator[Template]:
    """Yield what every fault of the library makes of the tap, if that makes a difference.

    Parameters
    ----------
    inquiry
        Knows oracle, config and checkpoint.
    seen
        The tap.
    only
        Names of the faults that are asked for; all of them if ``None``.
    """
    from harness.faults.library import library

    stage = _Tap(inquiry, seen)
    storage = stage.storage
    steps = library_steps(seen.part, seen.tap, inquiry.config, "float32", only=only)
    names = stage.names(steps, HEALTHY)
    weights = stage.weights(names)
    healthy = stage.run(steps, HEALTHY, weights)

    def wanted(name: str) -> bool:
        return only is None or name in only

    def template(name: str, faulty: Float | None) -> Iterator[Template]:
        if faulty is None or faulty.shape != seen.golden.shape:
            return
        expected = seen.golden + (faulty - healthy)
        expected[np.abs(expected) > LARGEST[storage]] = np.inf
        if not np.array_equal(expected, seen.golden):
            yield Template(name, expected)

    for fault in library().values():
        if fault.equivalent or not wanted(fault.name):
            continue
        if steps.differs(fault.name):
            yield from template(fault.name, stage.planted(steps, fault.name))
        if fault.area == PRECISION and fault.operations is not None and storage != "float32":
            narrow = library_steps(
                seen.part, seen.tap, inquiry.config, storage, area=PRECISION, only=only
            )
            if narrow.differs(fault.name):
                yield from stage.as_it_is(narrow, fault.name)
    if names:
        layer = seen.layer if seen.part == "block" else None
        given = (inquiry.config, layer, names, weights, inquiry.read, storage)
        for name, arrays in faulty_parameters(*given, only=only):
            yield from template(name, stage.run(steps, HEALTHY, arrays))


def storage_template(inquiry: Inquiry, seen: Exhibit, fault: str) -> tuple[Template, ...]:
    """Return what one fault makes of the tap if everything in it is of the storage dtype.

    A constant that a fault brings is rounded too: the root of a width is another number in float16.

    Returns
    -------
    tuple
        One template, or none where the fault does nothing or there is no narrower dtype.
    """
    storage = inquiry.oracle.storage
    if storage == "float32" or seen.probe is not None:
        return ()
    narrow = library_steps(seen.part, seen.tap, inquiry.config, storage, only=frozenset({fault}))
    if not narrow.differs(fault):
        return ()
    return tuple(_Tap(inquiry, seen).as_it_is(narrow, fault))


def acts(inquiry: Inquiry, layer: int, tap: str, fault: str) -> bool:
    """Return whether a fault changes the function of a block's tap, or the weights it reads."""
    one = frozenset({fault})
    steps = library_steps("block", tap, inquiry.config, "float32", only=one)
    if steps.differs(fault):
        return True
    stage = _Stage(inquiry, f"transformer.blocks.{layer}.")
    names = stage.names(steps, HEALTHY)
    given = (inquiry.config, layer, names, stage.weights(names), inquiry.read, stage.storage)
    return any(True for _ in faulty_parameters(*given, only=one))
