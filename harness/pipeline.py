"""``check``: cases -> measure -> judge -> localise -> record, readable on a screen or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from harness import forecast
from harness.checkpoint.finite import check_finite
from harness.checkpoint.reader import Checkpoint
from harness.diagnose.inquiry import Inquiry
from harness.diagnose.stage import diagnose
from harness.environment import environment
from harness.errors import BadInput, out_of_memory, ran_out_of_memory
from harness.expectation import Plan, coverage
from harness.faults.library import parse
from harness.inputs import load_cases
from harness.judge.factors import shipped
from harness.judge.verdict import Row, is_golden_itself, judge, outcome
from harness.localise import first_divergence
from harness.measure.arrival import Arrival, prove_arrival
from harness.measure.conversion import conversion
from harness.measure.oracle import Oracle, stored
from harness.measure.paths import path_events
from harness.measure.records import Failure, LogitSummary, Measurement, Skip
from harness.measure.relations import relation_events
from harness.measure.run import Case, Walk
from harness.measure.taps import Place, places
from harness.measure.trace_walk import TraceWalk
from harness.measure.traces import Dump
from harness.report import build
from harness.report.record import SCHEMA, CheckpointRecord, Report, SubjectRecord
from harness.streaming import Choice, Need, choose
from harness.subjects.load import STREAMED, Loaded, load_subject
from harness.subjects.protocol import (
    OPTIONAL_METHODS,
    PATH_METHODS,
    Subject,
    capabilities,
    path_capabilities,
    rounding_of,
)
from harness.tensors import Inventory, Topology, require_sound, take_inventory, topology_of

SHIPPED = Path(__file__).parent.parent / "cases" / "checkpoints" / "mpt-tiny-english"


@dataclass(frozen=True)
class Request:
    """What to check; fields as the options of ``mpt-conform check``.

    ``stream`` is ``None`` where the memory that is there decides.
    """

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
    bundle: Path | None = None
    stream: bool | None = None


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


@dataclass(frozen=True)
class Evidence:
    """What a verdict was made of, for those who look closer than the report does.

    Attributes
    ----------
    walk
        Holds the subject, the cases and the logits of golden and orders.
    rows
        Every judged measurement.
    inquiry
        What a diagnosis starts from; ``None`` if nothing diverged at a tap.
    """

    walk: Walk
    rows: Sequence[Row]
    inquiry: Inquiry | None


def check(
    request: Request,
    progress: Callable[[str], None] = lambda text: None,
    *,
    given: Subject | None = None,
    witness: Callable[[Evidence], None] = lambda evidence: None,
) -> Report:
    """Judge one subject on one checkpoint.

    Parameters
    ----------
    request
        What to check.
    progress
        Called with a sentence before each stage.
    given
        A subject that is there already, in place of the one that the request names.
    witness
        Called with what the verdict was made of.

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

    dump: Dump | None = None
    choice: Choice | None = None
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
        can = given is None and request.bundle is None and request.subject in STREAMED
        need = Need.of(config, topology, cases, request.dtype)
        choice = choose(request.stream if given is None else None, can, need)
        progress(f"loading {request.subject}; {choice.sentence}")
        loaded = (
            Loaded(given)
            if given is not None
            else load_subject(
                request.subject,
                request.checkpoint,
                dtype=request.dtype,
                target=request.target,
                fault=fault,
                bundle=request.bundle,
                stream=choice.stream,
            )
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
    evaluations = len(oracle.orders) + len(oracle.unrounded)
    needed = forecast.memory(config, topology, cases, evaluations)
    progress(f"the reference will take about {forecast.size(needed)} beside the subject")
    rows: list[Row] = []
    failures: list[Failure] = []
    skips: list[Skip] = []
    summaries: list[LogitSummary] = []
    arrivals: tuple[Arrival, ...] = ()
    walk: Walk | None = None
    if subject is None:
        failures.append(Failure(Place(None, "load"), "-", loaded.failure, loaded.detail))
    else:

        def proved(bounds: Measurement) -> bool:
            return not judge(bounds, dtype, shipped()).diverges

        walk = (
            Walk(oracle, subject, cases, layers=layers, progress=progress, proved=proved)
            if dump is None
            else TraceWalk(oracle, dump, cases, layers=layers, progress=progress, proved=proved)
        )
        paths = path_events(oracle, subject, cases, progress, proved)
        relations = relation_events(oracle, subject, progress, proved)
        for event in chain(walk.events(), paths, relations):
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

    plan = Plan(config, topology, request.dtype, layers, cases)
    axes = coverage(plan, subject, rows, skips, arrivals)
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
    inquiry = diagnosis = None
    if verdict == "diverges" and first is not None:
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
            checkpoint.digest,
        )
        if request.diagnose:
            diagnosis = diagnose(inquiry, progress)
    if walk is not None:
        witness(Evidence(walk, rows, inquiry))
    offers = capabilities(subject) | path_capabilities(subject)
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
            offers=tuple(sorted(offers)),
            lacks=tuple(sorted({*OPTIONAL_METHODS, *PATH_METHODS} - offers)),
        ),
        checkpoint=CheckpointRecord(
            path=str(request.checkpoint),
            digest=checkpoint.digest,
            config=checkpoint.config,
            tensors=len(topology),
            notes=_notes(config, material.inventory.aliases, choice),
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
        reproduce=reproduce(request, stream=choice is not None and choice.stream),
    )


def _require_plain(request: Request) -> None:
    """Refuse what a dump cannot follow: it holds its own cases, and nothing of it is run."""
    for option, value in (
        ("--stream", request.stream),
        ("--fault", request.fault),
        ("--prompts", request.prompts),
        ("--max-tokens", request.max_tokens),
        ("--bundle", request.bundle),
    ):
        if value is not None:
            raise BadInput(
                "has no effect on a dump",
                where=option,
                hint="give it to `mpt-conform trace`, which makes the dump",
            )


def reproduce(request: Request, *, stream: bool = False) -> str:
    """Return the command that repeats a check, block by block if it was `stream`-ed."""
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
        ("--bundle", request.bundle, None),
    ):
        if value != default:
            words += [option, str(value)]
    if request.layers is not None:
        words += ["--layers", ",".join(map(str, sorted(request.layers)))]
    if stream or request.stream is not None:
        words.append("--stream" if stream else "--no-stream")
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


def _notes(config: Any, aliases: tuple[str, ...], choice: Choice | None) -> tuple[str, ...]:
    notes = [f"config field {name} is not known and was not used" for name in config.unknown]
    notes += [f"tensor {name} repeats the tied embedding" for name in aliases]
    if choice is not None and choice.note:
        notes.append(choice.note)
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
        if ran_out_of_memory(error):
            raise out_of_memory("parameters()") from error
        reason = f"parameters(): raised {type(error).__name__}: {error}"
        failures.append(Failure(Place(None, "load"), "-", reason, traceback.format_exc()))
        return ()
