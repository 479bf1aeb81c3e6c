"""Whether a fault that fits one tap is borne out by the others of the block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.diagnose.exhibit import exhibit
from harness.diagnose.inquiry import Inquiry
from harness.diagnose.match import Match, Scene
from harness.diagnose.scene import scene_of, witness_of
from harness.diagnose.steps import library_steps
from harness.diagnose.templates import acts, library_templates
from harness.measure.records import Measurement
from harness.measure.statistics import Float
from harness.measure.taps import Place, block_widths


def told_apart(
    inquiry: Inquiry,
    measured: Measurement,
    group: tuple[Match, ...],
    taps: Sequence[str] | None,
) -> tuple[Match, ...]:
    """Return those of a group that also predict the taps named; those of the block if ``None``.

    A fault that acts at one tap alone leaves the others as they should be; one that acts at several
    shows at all of them.
    """
    names = frozenset(m.fault for m in group)
    left = {m.fault: 0.0 for m in group}
    worst = {m.fault: m.ratio for m in group}
    prompt, layer = measured.prompt, measured.place.layer
    if measured.place.tap == "alibi":
        # The probe has no case of its own; the bias acts in every block.
        prompt, layer = max(inquiry.cases, key=lambda case: case.ids.shape[1]).name, 0
    witness = witness_of(inquiry, prompt)
    for tap in taps or block_widths(inquiry.oracle.config):
        if tap == measured.place.tap:
            continue
        seen = exhibit(witness, Place(layer, tap))
        scene = scene_of(inquiry, seen)
        predicted: dict[str, list[Float]] = {name: [] for name in names}
        for template in library_templates(inquiry, seen, names):
            predicted[template.fault].append(template.expected)
        if not any(predicted.values()):
            continue
        for name, several in predicted.items():
            # A fault without a template here leaves the tap as it should be.
            ratio, rest = min(_fit(scene, expected) for expected in several or [seen.golden])
            worst[name], left[name] = max(worst[name], ratio), left[name] + rest
    fitting = [m for m in group if worst[m.fault] <= 1.0]
    return tuple(sorted(fitting, key=lambda m: (left[m.fault], m.left)))


def _hidden(inquiry: Inquiry, layer: int, tap: str) -> tuple[str, ...]:
    """Return the taps that a sub-module computes on its way, where it is declared as fused."""
    steps = library_steps("block", tap, inquiry.config, "float32", only=frozenset())
    declared = inquiry.oracle.part(layer).inputs_of(tap)
    return tuple(
        name
        for name in steps.reads()
        if name in block_widths(inquiry.oracle.config) and name not in declared
    )


def borne_out(inquiry: Inquiry, measured: Measurement, fault: str) -> bool:
    """Return whether no other tap of the block speaks against a fault.

    Against it speaks a tap where it would show and nothing does, and one that diverges where it
    does nothing: then it is something else, which looks the same at the tap that was matched.
    """
    layer = measured.place.layer
    assert layer is not None, measured.place
    diverging = {
        row.measurement.place.tap
        for row in inquiry.rows
        # What is not finite any more says nothing about its own sub-module.
        if row.diverges and np.isfinite(row.ratio)
        if row.measurement.mode == "local" and row.measurement.place.layer == layer
    }
    witness = witness_of(inquiry, measured.prompt)
    for tap in block_widths(inquiry.oracle.config):
        if tap == measured.place.tap:
            continue
        inside = (tap, *_hidden(inquiry, layer, tap))
        if not any(acts(inquiry, layer, one, fault) for one in inside):
            if tap in diverging:
                return False
            continue
        if tap in diverging:
            continue
        seen = exhibit(witness, Place(layer, tap))
        scene = scene_of(inquiry, seen)
        predicted = [t.expected for t in library_templates(inquiry, seen, frozenset({fault}))]
        if predicted and min(_fit(scene, expected)[0] for expected in predicted) > 1.0:
            return False
    return True


def _fit(scene: Scene, expected: Float) -> tuple[float, float]:
    """Return how far the observed is from a template, over the limits and as a squared error."""
    beyond = ~np.isfinite(scene.observed) & ~np.isfinite(expected)
    seen, wanted = (np.where(beyond, scene.golden, a) for a in (scene.observed, expected))
    ratio = scene.ratio(seen, wanted)
    if not np.isfinite(ratio):
        return np.inf, np.inf
    return ratio, float(np.square((seen - wanted) / scene.noise(scene.golden)).sum())
