"""From the results of a campaign to a certificate: counting, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from harness.certify.bounds import CONFIDENCE, upper_bound
from harness.certify.results import FaultRun, HealthyRun, Run
from harness.errors import BadInput

SCHEMA = 1


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    of: int

    @property
    def percent(self) -> float:
        """In percent; 100 of nothing."""
        return 100.0 * self.count / self.of if self.of else 100.0


@dataclass(frozen=True)
class KillRate:
    """What the gate blocks of one area.

    Attributes
    ----------
    full
        By a tap, a failed call or a tensor that did not arrive.
    envelope_only
        By a tap or a failed call alone.
    leave_one_out
        With the fault's own template removed. Templates name what has diverged and never make it
        diverge, so that none of them could be missed; counted is what diverges all the same.
    """

    full: Share
    envelope_only: Share
    leave_one_out: Share


@dataclass(frozen=True)
class Survivor:
    """A fault that the gate lets through, and how close it came."""

    fault: str
    area: str
    why: str


@dataclass(frozen=True)
class Healthy:
    """How often the gate cries wolf.

    Attributes
    ----------
    runs
        One subject on one checkpoint in one dtype.
    inputs
        Each with a verdict of its own, summed over the runs.
    clusters
        Distinct weights; runs that share them are not independent.
    flagged, flagged_clusters
        False alarms.
    upper_bound
        Of the rate of flagged clusters, exact, at the stated confidence.
    by_subject
        Runs and false alarms of each.
    """

    runs: int
    inputs: int
    clusters: int
    flagged: int
    flagged_clusters: int
    confidence: float
    upper_bound: float
    by_subject: Mapping[str, Share]
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Where and what, among the faults that were caught.

    Attributes
    ----------
    layer, tap
        First divergence in the layer, and in the sub-module, where the fault was planted.
    named
        Diagnosis names the fault, and tells it from every other.
    named_or_alike
        Or names it among those that do the same at the exposure.
    held_out
        With the fault's mechanism left out of the library, the diagnosis is "none of these".
    """

    layer: Share
    tap: Share
    named: Share
    named_or_alike: Share
    held_out: Share


@dataclass(frozen=True)
class Margin:
    """How far the limits lie from both sides at one kind of tap; ratios to the limit."""

    largest_healthy: float | None
    smallest_killed: float | None


@dataclass(frozen=True)
class Rival:
    """A published rule on the same logits."""

    killed: Share
    flagged: Share


@dataclass(frozen=True)
class Change:
    """What differs from the certificate that this one replaces."""

    factors: str
    gained: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Certificate:
    """The evidence of one gate on one target."""

    schema: int
    digest: str
    target: str
    dtype: str
    factors: str
    stamp: str
    sample: str
    versions: Mapping[str, str]
    seeds: tuple[int, int] | None
    kill: Mapping[str, KillRate]
    total: KillRate
    killed: tuple[str, ...]
    survivors: tuple[Survivor, ...]
    equivalent: Share
    healthy: Healthy | None
    accuracy: Accuracy
    misplaced: tuple[str, ...]
    unnamed: tuple[str, ...]
    margins: Mapping[str, Margin]
    rivals: Mapping[str, Rival]
    change: Change | None


def certify(
    runs: Sequence[Run],
    *,
    target: str,
    dtype: str,
    factors: str,
    stamp: str,
    sample: str,
    versions: Mapping[str, str],
    seeds: tuple[int, int] | None,
    previous: Certificate | None = None,
) -> Certificate:
    """Return the certificate of a campaign.

    Parameters
    ----------
    runs
        Results, of faults in every layer and in one, of equivalent ones and of healthy subjects.
    target, dtype, factors, stamp, versions, seeds
        What they depend on.
    sample
        What share of the library was run; empty for all of it.
    previous
        The certificate that this one replaces.

    Raises
    ------
    ValueError
        If no fault was run: nothing is certified by nothing.
    """
    planted = [run for run in runs if isinstance(run, FaultRun) and not run.equivalent]
    everywhere = [run for run in planted if run.layer is None]
    if not everywhere:
        raise ValueError("no fault was run")
    same = [run for run in runs if isinstance(run, FaultRun) and run.equivalent]
    healthy = [run for run in runs if isinstance(run, HealthyRun)]
    caught = [run for run in planted if run.killed]
    areas = sorted({run.area for run in everywhere})
    killed = tuple(sorted(run.fault for run in everywhere if run.killed))
    unsigned = Certificate(
        schema=SCHEMA,
        digest="",
        target=target,
        dtype=dtype,
        factors=factors,
        stamp=stamp,
        sample=sample,
        versions=versions,
        seeds=seeds,
        kill={area: kill_rate([r for r in everywhere if r.area == area]) for area in areas},
        total=kill_rate(everywhere),
        killed=killed,
        survivors=tuple(
            Survivor(run.fault, run.area, _why(run)) for run in everywhere if not run.killed
        ),
        # What is not judged to conform is flagged, be it an error.
        equivalent=Share(sum(run.verdict != "conforms" for run in same), len(same)),
        healthy=_healthy(healthy) if healthy else None,
        accuracy=accuracy(caught),
        misplaced=tuple(
            f"{r.key.removeprefix('fault ')}: expected {r.expected}, found {r.found}"
            for r in caught
            if r.by_tap and r.found != r.expected
        ),
        unnamed=tuple(
            f"{r.key.removeprefix('fault ')}: {r.named or 'none of these'}"
            for r in caught
            if r.named != r.fault
        ),
        margins=margins(everywhere, healthy),
        # A rule made for one dtype is not held against the noise of a coarser one.
        rivals=_rivals(everywhere, [run for run in healthy if run.dtype == dtype]),
        change=None if previous is None else _change(previous, factors, killed, everywhere),
    )
    return replace(unsigned, digest=content_digest(unsigned))


def content_digest(certificate: Certificate) -> str:
    """Return the digest of everything but the digest itself."""
    content = msgspec.json.encode(replace(certificate, digest=""), order="sorted")
    return hashlib.sha256(content).hexdigest()


def _share(runs: Iterable[Any], holds: Callable[[Any], bool]) -> Share:
    every = list(runs)
    return Share(sum(map(holds, every)), len(every))


def kill_rate(runs: Sequence[FaultRun]) -> KillRate:
    """Return the three rates of some faults."""
    return KillRate(
        full=_share(runs, lambda run: run.killed),
        envelope_only=_share(runs, lambda run: run.killed and run.by_tap),
        leave_one_out=_share(runs, lambda run: run.killed),
    )


def layer_of(place: str) -> str:
    """Return the block of a place; the bias enters with the first, both ends are their own."""
    head, _, rest = place.partition("transformer.blocks.")
    if rest and not head:
        return rest.partition(".")[0]
    return "0" if place == "alibi" else place


def accuracy(caught: Sequence[FaultRun]) -> Accuracy:
    """Return how exactly the caught faults were located and named."""
    seen = [run for run in caught if run.by_tap]
    return Accuracy(
        layer=_share(seen, lambda run: layer_of(run.found) == layer_of(run.expected)),
        tap=_share(seen, lambda run: run.found == run.expected),
        named=_share(caught, lambda run: run.named == run.fault and not run.alike),
        named_or_alike=_share(
            caught, lambda run: run.named is not None and run.fault in (run.named, *run.alike)
        ),
        held_out=_share(caught, lambda run: run.held_out is None),
    )


def margins(planted: Sequence[FaultRun], healthy: Sequence[HealthyRun]) -> dict[str, Margin]:
    """Return the margins both ways, by mode and tap.

    A fault counts at the tap where it was first seen.
    """
    largest: dict[str, float] = {}
    for run in healthy:
        for cell, ratio in run.ratios.items():
            largest[cell] = max(largest.get(cell, 0.0), ratio)
    smallest: dict[str, float] = {}
    for fault in planted:
        tap = fault.found.split(".", 3)[-1] if "blocks." in fault.found else fault.found
        cell = f"{fault.mode} {tap}"
        reached = fault.ratios.get(cell)
        if fault.killed and reached is not None:
            smallest[cell] = min(smallest.get(cell, reached), reached)
    return {
        cell: Margin(largest.get(cell), smallest.get(cell))
        for cell in sorted({*largest, *smallest})
    }


def _healthy(runs: Sequence[HealthyRun]) -> Healthy:
    clusters = {run.weights for run in runs}
    flagged = [run for run in runs if run.flagged]
    struck = {run.weights for run in flagged}
    names = sorted({run.subject for run in runs})
    return Healthy(
        runs=len(runs),
        inputs=sum(run.inputs for run in runs),
        clusters=len(clusters),
        flagged=len(flagged),
        flagged_clusters=len(struck),
        confidence=CONFIDENCE,
        upper_bound=upper_bound(len(struck), len(clusters)),
        by_subject={
            name: _share([r for r in runs if r.subject == name], lambda run: run.flagged)
            for name in names
        },
        alarms=tuple(f"{r.key}: {r.verdict} at {r.found or r.detail}" for r in flagged),
    )


def _rivals(planted: Sequence[FaultRun], healthy: Sequence[HealthyRun]) -> dict[str, Rival]:
    every: tuple[Run, ...] = (*planted, *healthy)
    names = dict.fromkeys(name for run in every for name in run.rules)

    def rejects(name: str) -> Callable[[Any], bool]:
        # What never came to logits, because a call failed, is refused by every rule.
        return lambda run: not run.rules.get(name, False)

    return {
        name: Rival(_share(planted, rejects(name)), _share(healthy, rejects(name)))
        for name in names
    }


def _why(run: FaultRun) -> str:
    if run.verdict == "error":
        return f"the check failed: {run.detail}"
    if run.verdict == "not-proven":
        return f"not proven: {run.detail}"
    if run.ratio is None:
        return "nothing was measured"
    closest = max(run.ratios, key=lambda cell: run.ratios[cell])
    return f"closest to a limit is {closest}, at {100 * run.ratio:.0f} % of it"


def _change(
    previous: Certificate, factors: str, killed: tuple[str, ...], runs: Sequence[FaultRun]
) -> Change:
    before, now = set(previous.killed), set(killed)
    ran = {run.fault for run in runs}
    return Change(
        "the same" if previous.factors == factors else f"{previous.factors} -> {factors}",
        tuple(sorted(now - before)),
        tuple(sorted((before & ran) - now)),
    )


def read_certificate(content: bytes) -> Certificate:
    """Return a certificate that was written before.

    Raises
    ------
    msgspec.MsgspecError
        If it is none, or its digest is not that of its content.
    """
    found = msgspec.json.decode(content, type=Certificate)
    if content_digest(found) != found.digest:
        raise msgspec.ValidationError("the digest is not that of the content")
    return found


def fallen(before: Certificate, now: Certificate) -> tuple[str, ...]:
    """Return every figure of a certificate that a new measurement falls below.

    A sample is held to what the certificate says of the same faults: none that was caught may
    survive. Rates are compared where all of the library was run.
    """
    worse = [f"{name} was caught and is not" for name in (now.change.lost if now.change else ())]
    if now.healthy is not None and now.healthy.flagged > (
        before.healthy.flagged if before.healthy else 0
    ):
        worse += [f"false alarm: {alarm}" for alarm in now.healthy.alarms]
    if now.equivalent.count > before.equivalent.count:
        worse.append(f"{now.equivalent.count} equivalent faults are flagged")
    if not now.sample:
        for area, rate in before.kill.items():
            mine = now.kill.get(area)
            if mine is None or mine.full.percent < rate.full.percent:
                worse.append(f"{area}: kill rate fell below {rate.full.percent:.1f} %")
        for name in ("layer", "tap", "named_or_alike", "held_out"):
            old, new = getattr(before.accuracy, name), getattr(now.accuracy, name)
            if new.percent < old.percent:
                worse.append(f"{name}: {new.percent:.1f} %, was {old.percent:.1f} %")
    return tuple(worse)


def committed(target: str = "llvm") -> Path:
    """Where the certificate of a target that came with the package lies."""
    return Path(str(resources.files("harness.certify").joinpath(f"certificate-{target}.json")))


def shipped_certificate(target: str = "llvm") -> Certificate:
    """Return the certificate of a target that came with the package.

    Raises
    ------
    BadInput
        If there is none for that target.
    """
    try:
        return read_certificate(committed(target).read_bytes())
    except OSError as error:
        raise BadInput(
            "there is no certificate for this target",
            where=target,
            hint="`mpt-conform certify --target TARGET --json FILE` makes one",
        ) from error
