"""``mpt-conform certify`` from its options to a certificate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.certify.campaign import Plan, factors_digest, run, sampled, stamp
from harness.certify.certificate import Certificate, certify, fallen, read_certificate
from harness.certify.healthy import FIRST_SEED, require_disjoint
from harness.certify.lines import cost
from harness.certify.planting import confined_layer
from harness.certify.results import Record
from harness.environment import environment
from harness.errors import BadInput
from harness.faults.library import library, parse
from harness.judge.factors import shipped

SEEDS = 100
"""Healthy checkpoints of a whole campaign."""


@dataclass(frozen=True)
class Options:
    """As the command line has them.

    Attributes
    ----------
    target, dtype
        Of the planted faults.
    sample
        Run every n-th fault and every n-th healthy checkpoint only.
    only
        Run these faults only, and no healthy subject.
    seeds
        How many healthy checkpoints.
    record
        File of results that a campaign goes on from.
    against
        A certificate that this one must not fall below.
    processes
        At once.
    """

    target: str = "llvm"
    dtype: str = "float16"
    sample: int = 1
    only: tuple[str, ...] = ()
    seeds: int = SEEDS
    record: Path | None = None
    against: Path | None = None
    processes: int = 2


def make_certificate(
    options: Options, progress: Callable[[str], None]
) -> tuple[Certificate, tuple[str, ...]]:
    """Run a campaign; return its certificate and every figure that fell.

    Raises
    ------
    BadInput
        For an unknown fault, seeds that calibration has seen, or a file that is no certificate.
    """
    previous = _previous(options)
    names = _names(options)
    confined = [(name, layer) for name in names if (layer := confined_layer(library()[name]))]
    seeds = range(FIRST_SEED, FIRST_SEED + (0 if options.only else options.seeds))
    require_disjoint(seeds, shipped().record["seeds"])
    chosen: list[int | None] = list(seeds[:: options.sample])
    healthy = [None, *chosen] if chosen else []
    plan = Plan(
        tuple((name, None) for name in names) + tuple(confined),
        tuple(healthy),
        options.dtype,
        options.target,
    )
    mark = stamp(options.target)
    runs = run(plan, Record(options.record, mark), progress, options.processes)
    progress(f"of one process: {cost(runs)}")
    certificate = certify(
        runs,
        target=options.target,
        dtype=options.dtype,
        factors=factors_digest(),
        stamp=mark,
        sample=_sample(options, len(names)),
        versions=environment(),
        seeds=(seeds.start, seeds.stop) if len(seeds) else None,
        previous=previous,
    )
    return certificate, fallen(previous, certificate) if previous else ()


def _names(options: Options) -> tuple[str, ...]:
    for name in options.only:
        parse(name.partition("@")[0], 1)
    names = options.only or tuple(library())
    return sampled(names, options.sample)


def _sample(options: Options, count: int) -> str:
    if options.only or options.sample > 1:
        return f"{count} of {len(library())} faults of the library"
    return ""


def _previous(options: Options) -> Certificate | None:
    if options.against is None:
        return None
    try:
        return read_certificate(options.against.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(options.against)) from error
    except msgspec.MsgspecError as error:
        raise BadInput(f"is no certificate: {error}", where=str(options.against)) from error


def split(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return names given one by one or with commas between them."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part)
