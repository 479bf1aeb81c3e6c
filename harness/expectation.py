"""What a check set out to compare, against what it compared: a gap is never green."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from harness.judge.coverage import Axis, Omission
from harness.judge.verdict import Row
from harness.measure.arrival import Arrival
from harness.measure.paths import split_checks
from harness.measure.records import Skip
from harness.measure.relations import split_relations
from harness.measure.run import Case
from harness.measure.taps import Place, places
from harness.subjects.protocol import left_out, path_capabilities
from harness.tensors import Topology


@dataclass(frozen=True)
class Plan:
    """What a check set out to compare, known before anything was measured.

    Attributes
    ----------
    config, topology
        Of the checkpoint.
    dtype
        Storage dtype that was asked for.
    layers
        Layers to be judged.
    cases
        Inputs.
    """

    config: Any
    topology: Topology
    dtype: str
    layers: frozenset[int]
    cases: Sequence[Case]


def coverage(
    plan: Plan,
    subject: Any,
    rows: Sequence[Row],
    skips: Sequence[Skip],
    arrivals: Sequence[Arrival],
) -> tuple[Axis, ...]:
    """Return, per axis, what was planned against what was judged.

    Parameters
    ----------
    plan
        The expectation, from config, topology and request alone.
    subject
        What was judged; ``None`` if it could not be made.
    rows, skips, arrivals
        What came of it.
    """
    config, topology, cases, layers = plan.config, plan.topology, plan.cases, plan.layers
    lacking = {s.item for s in skips if s.axis == "capability"}
    judged = [
        row.measurement for row in rows if not row.measurement.constant or _flat_bias(row, config)
    ]
    seen = {m.place for m in judged}
    every = places(config)
    absent = {s.item: s.reason for s in skips if s.axis == "dump"}

    def lacks(place: Place) -> str | None:
        """Return why a tap was left out on purpose, if it was."""
        method = _method(place)
        if place.path in absent:
            return absent[place.path]
        if place.layer is not None and place.layer not in layers:
            return "--layers leaves it out"
        if method in lacking and place.tap != "logits":
            return f"the subject has no {method}()"
        return None

    reasons: dict[str, int] = {}
    for place in every:
        reason = lacks(place)
        if reason is not None and place not in seen:
            reasons[reason] = reasons.get(reason, 0) + 1
    taps = Axis(
        "taps",
        len(every),
        len(set(every) & seen),
        tuple(Omission(count, reason) for reason, count in reasons.items()),
    )
    whole = [
        layer
        for layer in range(config.n_layers)
        if all(place in seen for place in every if place.layer == layer)
    ]
    layer_reasons: dict[str, int] = {}
    for layer in set(range(config.n_layers)) - set(whole):
        mine = [lacks(p) for p in every if p.layer == layer and p not in seen]
        if mine and None not in mine:
            layer_reasons[str(mine[0])] = layer_reasons.get(str(mine[0]), 0) + 1
    layer_axis = Axis(
        "layers",
        config.n_layers,
        len(whole),
        tuple(Omission(count, reason) for reason, count in layer_reasons.items()),
    )
    finished = {m.prompt for m in judged if m.place.tap == "logits"}
    if any(s.axis == "dump" and s.item == "logits" for s in skips):
        finished = {m.prompt for m in judged}
    done = [case for case in cases if case.name in finished]
    tensor_skips: tuple[Omission, ...] = ()
    if not arrivals and not hasattr(subject, "parameters"):
        tensor_skips = (Omission(len(topology), "the subject has no parameters()"),)
    arrived = sum(arrival.arrived for arrival in arrivals)
    tensors = Axis("tensors", len(topology), arrived, tensor_skips)
    paths = _paths(config, subject, seen)
    return (
        tensors,
        layer_axis,
        taps,
        *paths,
        Axis("cases", len(cases), len(done)),
        Axis("positions", sum(int(c.ids.size) for c in cases), sum(int(c.ids.size) for c in done)),
        Axis("dtypes", 1, int(getattr(subject, "dtype", None) == plan.dtype and bool(rows))),
        Axis("targets", 1, int(bool(rows))),
    )


def _paths(config: Any, subject: Any, seen: Set[Place]) -> tuple[Axis, ...]:
    """Return the axis of paths over a cache and of relations; none where a subject has neither.

    Unlike a tap, which every MPT has inside whether it shows it or not, a path that is not there is
    not part of what was asked to conform: the report names the methods that the subject lacks. One
    that a subject says it leaves out is part of it, and counted as left out.
    """
    there, beyond = path_capabilities(subject), left_out(subject)
    every = there | set(beyond)
    checks, relations = split_checks(every, config)[0], split_relations(every, config)[0]
    needs = {f"paths.{check.name}": check.needs for check in checks}
    needs |= {f"paths.{relation.name}": ("attend",) for relation in relations}
    if not needs:
        return ()
    compared = needs.keys() & {place.tap for place in seen}
    reasons: dict[str, int] = {}
    for name in needs.keys() - compared:
        lacking = [method for method in needs[name] if method not in there]
        if lacking:
            reason = beyond[lacking[0]]
            reasons[reason] = reasons.get(reason, 0) + 1
    omissions = tuple(Omission(count, reason) for reason, count in reasons.items())
    return (Axis("paths", len(needs), len(compared), omissions),)


def _method(place: Place) -> str:
    if place.layer is not None:
        return "block"
    if place.tap == "alibi":
        return "attention_bias"
    return "embed" if place.tap in ("transformer.wte", "transformer.wpe") else "head"


def _flat_bias(row: Row, config: Any) -> bool:
    """Without ALiBi the bias is a constant by design, and judged as such."""
    return row.measurement.place.tap == "alibi" and not config.alibi
