"""``mpt-conform shrink``: from a failing check to a small script that fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import BadInput, ConformanceError
from harness.faults.library import parse
from harness.pipeline import SHIPPED, Request, check, open_material
from harness.report.record import Report
from harness.shrink.reduce import reduce_fields
from harness.shrink.repro import script
from harness.shrink.trial import Signature, Trial, fields_of, smaller, trial_of

MOST_TRIALS = 60
ROWS, TOKENS = 2, 64
"""Input of the first synthetic trial."""


@dataclass(frozen=True)
class Shrunk:
    """A small failure.

    Attributes
    ----------
    script
        Source of ``repro.py``.
    signature
        What it shares with the failure it was made from.
    fields
        What is left, by name.
    report
        What the gate says of it.
    tried, complete
        Trials, and whether another pass would change nothing.
    """

    script: str
    signature: Signature
    fields: Mapping[str, Any]
    report: Report
    tried: int
    complete: bool


def shrink(request: Request, progress: Callable[[str], None] = lambda text: None) -> Shrunk:
    """Make the failure of a check small.

    The weights become synthetic ones, on which every size can be made smaller. Where the failure
    does not show on those, it depends on the weights, and is said so.

    Raises
    ------
    BadInput
        If nothing fails, or not without the weights of the checkpoint.
    """
    base, longest = _base(request)
    wanted: Signature | None = None
    # A planted fault fails on its exposure by definition; anything else is asked first.
    if base.fault is None or request.checkpoint != SHIPPED:
        progress("checking")
        wanted = Signature.of(check(replace(request, diagnose=False)))
        if wanted is None:
            raise BadInput("there is nothing to shrink: the check does not diverge")
    fields = fields_of(base.config, ROWS, min(TOKENS, longest))
    reports: dict[str, Report] = {}

    def fails(candidate: Mapping[str, Any]) -> bool:
        trial = trial_of(candidate, base, longest)
        progress(f"trial {len(reports) + 1}: {_describe(candidate)}")
        try:
            report = trial.report()
        except ConformanceError:
            # A config without what the fault takes hold of cannot be planted with it.
            return False
        reports[repr(trial)] = report
        return Signature.of(report) == wanted

    first = trial_of(fields, base, longest)
    progress("the same failure on synthetic weights")
    report = reports[repr(first)] = first.report()
    found = Signature.of(report)
    wanted = wanted or found
    if found is None or found != wanted:
        where = f"{wanted.tap} ({wanted.mode})" if wanted else "nowhere"
        raise BadInput(
            "the failure depends on the weights of the checkpoint, and cannot be made smaller "
            "without them",
            where=str(request.checkpoint),
            expected=where,
            found=f"{found.tap} ({found.mode})" if found else "no divergence",
            hint="check --layers and --max-tokens narrow it down on the checkpoint itself",
        )
    result = reduce_fields(fields, smaller, fails, MOST_TRIALS)
    small = trial_of(result.fields, base, longest)
    final = reports[repr(small)]
    return Shrunk(
        script(small, wanted, final), wanted, result.fields, final, result.tried, result.complete
    )


def _base(request: Request) -> tuple[Trial, int]:
    """Return the trial that a request becomes, and the longest sequence."""
    from cases.exposure import EXPOSURES
    from cases.synthetic import DEFAULT_PROFILE

    profile = DEFAULT_PROFILE
    config: Mapping[str, Any] | None = None
    if request.fault is not None:
        fault = parse(request.fault.partition("@")[0], 1).fault
        shown = EXPOSURES.get(fault.exposure)
        if shown is not None and request.checkpoint == SHIPPED:
            config, profile = shown.config, shown.profile
    if config is None:
        config = open_material(request.checkpoint).checkpoint.config
    trial = Trial(
        config, asdict(profile), (), request.subject, request.fault, request.dtype, request.target
    )
    return trial, int(config.get("max_seq_len", 2048))


def _describe(fields: Mapping[str, Any]) -> str:
    sizes = ("n_layers", "n_heads", "head_dim", "rows", "tokens", "vocab_size")
    return ", ".join(f"{name} {fields[name]}" for name in sizes)


def lines(shrunk: Shrunk) -> Iterator[str]:
    """Yield what is left, in words."""
    yield f"still diverges at {shrunk.signature.tap} ({shrunk.signature.mode})"
    yield f"  {_describe(shrunk.fields)}"
    end = "" if shrunk.complete else "; not finished: more trials would make it smaller"
    yield f"  {shrunk.tried} trials{end}"


def write(shrunk: Shrunk, path: Path) -> None:
    """Write ``repro.py``."""
    from harness.report.files import write_whole

    write_whole(path, shrunk.script.encode())
