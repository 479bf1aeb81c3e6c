"""Diagnosis as a stage of its own: after a divergence, and only then."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from harness.diagnose.crosscheck import borne_out, told_apart
from harness.diagnose.deployed import (
    LOGITS,
    deployed_exhibit,
    deployed_templates,
    scene_around,
)
from harness.diagnose.exhibit import Exhibit, bias_exhibit, exhibit
from harness.diagnose.inquiry import Diagnosis, Inquiry
from harness.diagnose.match import Match, Scene, Template, match
from harness.diagnose.memory import kept
from harness.diagnose.paths import path_exhibit, path_templates
from harness.diagnose.scene import case_of, scene_of, witness_of
from harness.diagnose.templates import library_templates, storage_template
from harness.diagnose.whole import whole_templates
from harness.judge.verdict import Row, judge
from harness.measure.records import Measurement
from harness.measure.statistics import Float
from harness.measure.taps import Place
from harness.subjects.calls import SubjectFailure

_TABLE = re.compile(r"bias (\d+)x(\d+)")
MOST_TAPS = 4
"""Taps looked at when the first one is not explained."""


def diagnose(inquiry: Inquiry, progress: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """Name the fault that a divergence looks like.

    The first diverging tap is matched; if nothing there fits, the next ones of the same block that
    diverge by themselves, since a wrong mask shows in the probe of the bias and better in the
    context. Several faults that fit one tap alike are told apart by the block's other taps.
    """
    answer: Diagnosis | None = None
    for row in _suspects(inquiry):
        place = row.measurement.place
        progress(f"diagnosis: {place.path}")
        try:
            found = _at(inquiry, row, progress)
        except SubjectFailure as failure:
            found = _nothing(inquiry, place, 0, str(failure))
        except KeyError as missing:
            found = _nothing(inquiry, place, 0, f"the dump has no {missing}")
        except Exception as error:
            # The verdict stands without a name; what went wrong here must not hide it.
            reason = f"the diagnosis failed: {type(error).__name__}: {error}"
            found = _nothing(inquiry, place, 0, reason)
        if found.fault is not None:
            return found
        answer = answer or found
    first = inquiry.first
    if answer is None and first.tap.startswith("paths.") and first.mode == "deployed":
        try:
            answer = _over_a_cache(inquiry, progress)
        except Exception as error:
            reason = f"the diagnosis failed: {type(error).__name__}: {error}"
            answer = _nothing(inquiry, Place(None, first.tap), 0, reason)
    if answer is not None:
        return answer
    reason = "no sub-module diverges by itself from its own inputs"
    if first.mode == "call":
        reason = "the subject failed there"
    return Diagnosis(None, first.layer, (), first.tap, None, None, None, (), None, 0, reason)


def _suspects(inquiry: Inquiry) -> Iterator[Row]:
    """Yield the diverging taps that can be matched, the first one first, each place once."""
    first = inquiry.first

    # Only where nothing else diverges: what is wrong at a tap is wrong in the logits too.
    taps = any(row.diverges and row.measurement.mode == "local" for row in inquiry.rows)

    def matchable(row: Row) -> bool:
        measured = row.measurement
        whole = measured.mode == "deployed" and measured.place == LOGITS and not taps
        alone = measured.mode in ("alibi", "local") or measured.exact
        return row.diverges and (alone or whole)

    rows = [row for row in inquiry.rows if matchable(row)]
    # The case in which the first tap diverged, then the one in which it did so most.
    rows.sort(key=lambda r: (r.measurement.prompt != first.case, -_finite(r.ratio)))
    seen: set[Place] = set()
    mine = [
        row
        for row in rows
        if row.measurement.place.path == first.tap or row.measurement.mode == "deployed"
    ]
    beside = [
        row
        for row in rows
        if row.measurement.place.layer == first.layer and row.measurement.mode == "local"
    ]
    order = {row.measurement.place: -i for i, row in enumerate(inquiry.rows)}
    beside.sort(key=lambda r: -order[r.measurement.place])
    for row in (*mine, *beside):
        place = row.measurement.place
        if place not in seen and len(seen) < MOST_TAPS:
            seen.add(place)
            yield row


def _finite(ratio: float) -> float:
    return ratio if np.isfinite(ratio) else np.finfo(np.float64).max


def _nothing(inquiry: Inquiry, place: Place, tried: int, reason: str) -> Diagnosis:
    layers = _layers(inquiry, place)
    return Diagnosis(
        None, place.layer, layers, place.path, None, None, None, (), None, tried, reason
    )


def _layers(inquiry: Inquiry, place: Place) -> tuple[int, ...]:
    if place.layer is None:
        return ()
    return tuple(
        sorted(
            {
                row.measurement.place.layer
                for row in inquiry.rows
                if row.diverges
                and row.measurement.mode == "local"
                and row.measurement.place.tap == place.tap
                and row.measurement.place.layer is not None
            }
        )
    )


def _at(inquiry: Inquiry, row: Row, progress: Callable[[str], None]) -> Diagnosis:
    measured = row.measurement
    key = measured.place.path, measured.prompt
    if key not in inquiry.memory:
        exhibited = _exhibit(inquiry, measured)
        inquiry.memory[key] = exhibited, _remembered(inquiry, measured, exhibited)
    seen, every = inquiry.memory[key]
    left = [template for template in every if template.fault not in inquiry.excluded]
    progress(f"diagnosis: {measured.place.path}: {len(left)} templates")
    mode = "deployed" if measured.mode == "deployed" else None
    scene = scene_of(inquiry, seen, mode)
    if mode == "deployed":
        case = case_of(inquiry, measured.prompt)
        around = scene_around(inquiry.oracle, case, scene, inquiry.factors)
        scene = replace(scene, around=around)
    group, nearest = match(scene, left)
    if not group and nearest is not None and measured.mode != "deployed":
        group, _ = match(scene, storage_template(inquiry, seen, nearest.fault))
    if seen.part == "attend" and group:
        # The probe sees the bias of a few queries; what else the fault does shows in the context.
        group = told_apart(inquiry, measured, group, ("attn.context",))
    elif seen.part == "block":
        if len({m.fault for m in group}) > 1:
            group = told_apart(inquiry, measured, group, None) or group
        group = tuple(m for m in group if borne_out(inquiry, measured, m.fault))
    layer = 0 if measured.place.tap == "alibi" else measured.place.layer
    return _answer(inquiry, measured.place, layer, group, nearest, len(left))


def _answer(
    inquiry: Inquiry,
    place: Place,
    layer: int | None,
    group: Sequence[Match],
    nearest: Match | None,
    tried: int,
) -> Diagnosis:
    best = group[0] if group else nearest
    return Diagnosis(
        fault=group[0].fault if group else None,
        layer=layer,
        layers=_layers(inquiry, place),
        tap=place.path,
        coefficient=best.coefficient if best else None,
        uncertainty=best.uncertainty if best else None,
        explained=best.explained if best else None,
        alike=tuple(dict.fromkeys(m.fault for m in group if m.fault != group[0].fault)),
        nearest=None if group or best is None else best.fault,
        tried=tried,
        reason="" if group else _why(best, tried),
    )


def _over_a_cache(inquiry: Inquiry, progress: Callable[[str], None]) -> Diagnosis:
    """Match what shows on the paths of a deployment, and nowhere in the plain forward."""
    place = Place(None, inquiry.first.tap)
    key = "paths", ""
    if key not in inquiry.memory:
        seen = path_exhibit(inquiry.oracle, inquiry.subject, inquiry.cases, place)
        checks = ",".join(check.name for check in seen.checks)
        digest = hashlib.sha256(seen.golden.tobytes()).hexdigest()
        at = "\0".join((inquiry.checkpoint, inquiry.oracle.storage, checks, digest))

        def make() -> Iterator[Template]:
            return path_templates(inquiry.oracle, seen, inquiry.config, inquiry.read, progress)

        inquiry.memory[key] = seen, kept(inquiry.checkpoint, at, make)
    seen, every = inquiry.memory[key]
    left = [template for template in every if template.fault not in inquiry.excluded]
    storage, factors = inquiry.oracle.storage, inquiry.factors

    def ratio(observed: Float, expected: Float) -> float:
        return judge(seen.measure(observed, expected), storage, factors).ratio

    scene = Scene(
        seen.observed, seen.golden, seen.orders, lambda expected: seen.noise, ratio,
        factors.get("deployed", storage, "gain"), factors.alpha,
    )  # fmt: skip
    group, nearest = match(scene, left)
    return _answer(inquiry, place, None, group, nearest, len(left))


def _remembered(inquiry: Inquiry, measured: Measurement, seen: Exhibit) -> tuple[Template, ...]:
    """Return the templates of a tap, from memory if a check before this one has made them.

    They hang on the library, the checkpoint, the tap and what goes into it, and on nothing else of
    the subject: in a campaign most subjects come to a tap with the same inputs.
    """
    digest = hashlib.sha256(seen.golden.tobytes())
    for name, array in sorted(seen.inputs.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    blind = inquiry.dumped is None and not hasattr(inquiry.subject, "block")
    place = (
        measured.mode == "deployed",
        blind,
        measured.place.path,
        measured.prompt,
        seen.golden.shape,
    )
    parts = (inquiry.checkpoint, inquiry.oracle.storage, str(place), digest.hexdigest())
    key = "\0".join(parts)

    def make() -> Iterator[Template]:
        if measured.mode != "deployed":
            return library_templates(inquiry, seen)
        given = (
            inquiry.oracle, case_of(inquiry, measured.prompt), seen.golden, inquiry.config,
            inquiry.read,
        )  # fmt: skip
        if blind:
            return chain(deployed_templates(*given), whole_templates(*given))
        return deployed_templates(*given)

    return kept(inquiry.checkpoint, key, make)


def _why(best: Match | None, tried: int) -> str:
    if best is None:
        return f"none of {tried} templates acts here"
    return f"none of {tried} templates leaves no more than rounding"


def _exhibit(inquiry: Inquiry, measured: Measurement) -> Exhibit:
    if measured.place.tap == "alibi":
        table = _TABLE.fullmatch(measured.prompt)
        assert table is not None, measured.prompt
        return bias_exhibit(inquiry.oracle, inquiry.subject, int(table[1]), int(table[2]))
    if measured.mode == "deployed":
        case = case_of(inquiry, measured.prompt)
        return deployed_exhibit(inquiry.oracle, inquiry.subject, case)
    return exhibit(witness_of(inquiry, measured.prompt), measured.place)
