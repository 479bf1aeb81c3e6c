"""``check``: cases -> measure -> judge -> localise -> record, readable on a screen or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint.finite import check_finite
from harness.checkpoint.reader import Checkpoint
from harness.diagnose.stage import Inquiry, diagnose
from harness.environment import environment
from harness.errors import BadInput
from harness.faults.library import parse
from harness.inputs import load_cases
from harness.judge.coverage import Axis, Omission
from harness.judge.factors import shipped
from harness.judge.verdict import Row, is_golden_itself, judge, outcome
from harness.localise import first_divergence
from harness.measure.arrival import Arrival, prove_arrival
from harness.measure.conversion import conversion
from harness.measure.oracle import Oracle, stored
from harness.measure.records import Failure, LogitSummary, Measurement, Skip
from harness.measure.run import Case, Walk
from harness.measure.taps import Place, places
from harness.measure.trace_walk import TraceWalk
from harness.measure.traces import Dump
from harness.report import build
from harness.report.record import SCHEMA, CheckpointRecord, Report, SubjectRecord
from harness.subjects.load import Loaded, load_subject
from harness.subjects.protocol import capabilities, rounding_of
from harness.tensors import Inventory, Topology, require_sound, take_inventory, topology_of

SHIPPED = Path(__file__).parent.parent / "cases" / "checkpoints" / "mpt-tiny-english"


@dataclass(frozen=True)
class Request:
    """What to check; fields as the options of ``mpt-conform check``."""

    checkpoint: Path = SHIPPED
    subject: str = "relax"
    dtype: str = "float16"
    target: str = "llvm"
    prompts: str | None = None
    traces: Path | None = None
    fault: str | None = None
    layers: frozenset[int] | None = None
    max_tokens: int | None = None
    device: str = "cpu"
    diagnose: bool = True


def parse_config(raw: dict[str, Any], where: str) -> Any:
    """Return the reference room's config, with a wrong field as one sentence.

    Raises
    ------
    BadInput
        If either room refuses the config.
    """
    from reference.config import ConfigError, MPTConfig
    from relax_impl.config import ConfigError as RelaxConfigError
    from relax_impl.config import MPTConfig as RelaxConfig

    try:
        RelaxConfig.from_dict(raw)
        return MPTConfig.from_dict(raw)
    except (ConfigError, RelaxConfigError) as error:
        raise BadInput(str(error), where=where) from error


@dataclass(frozen=True)
class Material:
    """A checkpoint that can be judged on, with what its config demands."""

    checkpoint: Checkpoint
    config: Any
    topology: Topology
    inventory: Inventory


def open_material(path: Path) -> Material:
    """Open a checkpoint and require every tensor to be there, in shape, in type and finite.

    Raises
    ------
    BadInput
        If checkpoint or config cannot be used.
    """
    checkpoint = Checkpoint.open(path)
    config = parse_config(checkpoint.config, str(path / "config.json"))
    topology = topology_of(checkpoint.config)
    inventory = take_inventory(topology, checkpoint)
    require_sound(inventory, str(path))
    check_finite(checkpoint)
    return Material(checkpoint, config, topology, inventory)


def check(request: Request, progress: Callable[[str], None] = lambda text: None) -> Report:
    """Judge one subject on one checkpoint.

    Raises
    ------
    BadInput
        If checkpoint, config, prompts or options cannot be used.
    NotProven
        If the target has no device here.
    """
    started = time.perf_counter()
    progress("reading the checkpoint")
    material = open_material(request.checkpoint)
    checkpoint, config, topology = material.checkpoint, material.config, material.topology
    layers = _layers(request.layers, config.n_layers)
    fault = parse(request.fault, config.n_layers) if request.fault is not None else None

    dump = None
    if request.traces is not None:
        _require_plain(request)
        dump = Dump.open(request.traces, config, request.dtype, checkpoint.digest)
    if dump is not None:
        cases: Sequence[Case] = dump.cases
        loaded = Loaded(dump.subject)  # type: ignore[arg-type]
    else:
        cases = load_cases(
            request.prompts, config, request.checkpoint, max_tokens=request.max_tokens
        )
        progress(f"loading {request.subject}")
        loaded = load_subject(
            request.subject,
            request.checkpoint,
            dtype=request.dtype,
            target=request.target,
            fault=fault,
        )
    subject = loaded.subject
    dtype = subject.dtype if subject is not None else request.dtype
    oracle = Oracle(
        config,
        checkpoint.read,
        storage=dtype,
        rounding=rounding_of(subject),
        device=request.device,
    )
    rows: list[Row] = []
    failures: list[Failure] = []
    skips: list[Skip] = []
    summaries: list[LogitSummary] = []
    arrivals: tuple[Arrival, ...] = ()
    if subject is None:
        failures.append(Failure(Place(None, "load"), "-", loaded.failure, loaded.detail))
    else:
        walk = (
            Walk(oracle, subject, cases, layers=layers, progress=progress)
            if dump is None
            else TraceWalk(oracle, dump, cases, layers=layers, progress=progress)
        )
        for event in walk.events():
            if isinstance(event, Measurement):
                rows.append(judge(event, dtype, shipped()))
            elif isinstance(event, Failure):
                failures.append(event)
            elif isinstance(event, Skip):
                skips.append(event)
            else:
                summaries.append(event)
        if hasattr(subject, "parameters"):
            progress("tensors")
            arrivals = _arrivals(subject, topology, checkpoint, dtype, failures)

    axes = _axes(request, config, topology, layers, cases, rows, skips, arrivals, subject)
    broken = sum(not arrival.arrived for arrival in arrivals)
    verdict = outcome(rows, failures, broken, axes)
    order = places(config)
    reason = ""
    if verdict == "conforms" and is_golden_itself(rows):
        verdict = "not-proven"
        reason = "the subject shows no rounding error at all: it is the golden itself"
    elif verdict == "not-proven":
        gaps = [axis.name for axis in axes if not axis.complete]
        reason = f"compared less than expected: {', '.join(gaps)}"
    first = first_divergence(rows, failures, order)
    diagnosis = None
    if verdict == "diverges" and first is not None and request.diagnose:
        inquiry = Inquiry(
            oracle,
            subject,
            cases,
            rows,
            first,
            checkpoint.config,
            checkpoint.read,
            shipped(),
            dump.taps if dump is not None else None,
        )
        diagnosis = diagnose(inquiry, progress)
    return Report(
        schema=SCHEMA,
        verdict=verdict,
        reason=reason,
        subject=SubjectRecord(
            name=getattr(subject, "name", request.subject),
            dtype=dtype,
            target=request.target,
            fault=fault.label if fault else None,
            rounding=asdict(rounding_of(subject)),
            offers=tuple(sorted(capabilities(subject))),
        ),
        checkpoint=CheckpointRecord(
            path=str(request.checkpoint),
            digest=checkpoint.digest,
            config=checkpoint.config,
            tensors=len(topology),
            notes=_notes(config, material.inventory.aliases),
        ),
        compared=build.axes_record(axes),
        first_divergence=build.divergence_record(first),
        taps=build.tap_records(rows, order),
        tensors=build.tensor_records(arrivals),
        logits=build.logit_records(summaries),
        failures=build.failure_records(failures),
        conversion=build.conversion_record(conversion(topology, checkpoint, dtype)),
        diagnosis=build.diagnosis_record(diagnosis),
        environment=environment(),
        seconds=time.perf_counter() - started,
        reproduce=reproduce(request),
    )


def _require_plain(request: Request) -> None:
    """Refuse what a dump cannot follow: it holds its own cases, and nothing of it is run."""
    for option, value in (
        ("--fault", request.fault),
        ("--prompts", request.prompts),
        ("--max-tokens", request.max_tokens),
    ):
        if value is not None:
            raise BadInput(
                "has no effect on a dump",
                where=option,
                hint="give it to `mpt-conform trace`, which makes the dump",
            )


def reproduce(request: Request) -> str:
    """Return the command that repeats a check."""
    import shlex

    words = ["mpt-conform", "check"]
    if request.checkpoint != SHIPPED:
        words.append(str(request.checkpoint))
    if request.traces:
        words += ["--traces", str(request.traces)]
    for option, value, default in (
        ("--subject", request.subject, "relax"),
        ("--dtype", request.dtype, "float16"),
        ("--target", request.target, "llvm"),
        ("--prompts", request.prompts, None),
        ("--fault", request.fault, None),
        ("--max-tokens", request.max_tokens, None),
    ):
        if value != default:
            words += [option, str(value)]
    if request.layers is not None:
        words += ["--layers", ",".join(map(str, sorted(request.layers)))]
    return shlex.join(words)


def _layers(chosen: frozenset[int] | None, n_layers: int) -> frozenset[int]:
    if chosen is None:
        return frozenset(range(n_layers))
    beyond = sorted(layer for layer in chosen if not 0 <= layer < n_layers)
    if beyond or not chosen:
        raise BadInput(
            "no such layer", where="--layers", expected=f"0..{n_layers - 1}", found=beyond or "none"
        )
    return chosen


def _notes(config: Any, aliases: tuple[str, ...]) -> tuple[str, ...]:
    notes = [f"config field {name} is not known and was not used" for name in config.unknown]
    notes += [f"tensor {name} repeats the tied embedding" for name in aliases]
    return tuple(notes)


def _arrivals(
    subject: Any, topology: Any, checkpoint: Checkpoint, dtype: str, failures: list[Failure]
) -> tuple[Arrival, ...]:
    import traceback

    try:
        held = subject.parameters()
        # A mapping may make its arrays when they are asked for; all at once may not fit.
        held = held if isinstance(held, Mapping) else dict(held)
        return prove_arrival(topology, stored(checkpoint.read, dtype), held)
    except Exception as error:
        reason = f"parameters(): raised {type(error).__name__}: {error}"
        failures.append(Failure(Place(None, "load"), "-", reason, traceback.format_exc()))
        return ()


def _axes(
    request: Request,
    config: Any,
    topology: Any,
    layers: frozenset[int],
    cases: Sequence[Case],
    rows: Sequence[Row],
    skips: Sequence[Skip],
    arrivals: Sequence[Arrival],
    subject: Any,
) -> tuple[Axis, ...]:
    """Return what was expected, from config, topology and request, against what was judged."""
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
    return (
        tensors,
        layer_axis,
        taps,
        Axis("cases", len(cases), len(done)),
        Axis("positions", sum(int(c.ids.size) for c in cases), sum(int(c.ids.size) for c in done)),
        Axis("dtypes", 1, int(getattr(subject, "dtype", None) == request.dtype and bool(rows))),
        Axis("targets", 1, int(bool(rows))),
    )


def _method(place: Place) -> str:
    if place.layer is not None:
        return "block"
    if place.tap == "alibi":
        return "attention_bias"
    return "embed" if place.tap in ("transformer.wte", "transformer.wpe") else "head"


def _flat_bias(row: Row, config: Any) -> bool:
    """Without ALiBi the bias is a constant by design, and judged as such."""
    return row.measurement.place.tap == "alibi" and not config.alibi
