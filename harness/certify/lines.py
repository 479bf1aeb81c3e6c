"""A certificate in words, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.certify.certificate import Certificate, Share
from harness.certify.results import FaultRun, HealthyRun, Run


def share(value: Share) -> str:
    """Return ``12 of 13 (92.3 %)``."""
    return f"{value.count} of {value.of} ({value.percent:.1f} %)" if value.of else "none run"


def table(certificate: Certificate) -> str:
    """Return the published rules beside this gate as a Markdown table.

    The rules saw the logits of the same runs: every fault of the library, and the healthy runs of
    the certificate's dtype. This gate's healthy runs are of every dtype.
    """
    c = certificate
    ours = (c.healthy.flagged, c.healthy.runs) if c.healthy else (0, 0)
    rows = [
        ("| rule | faults caught | healthy runs flagged |"),
        ("|---|---|---|"),
        f"| **this gate** | **{share(c.total.full)}** | **{share(Share(*ours))}** |",
    ]
    rows += [
        f"| {name} | {share(rival.killed)} | {share(rival.flagged)} |"
        for name, rival in c.rivals.items()
    ]
    return "\n".join(rows)


def cost(runs: Sequence[Run]) -> str:
    """Return how long a campaign took, in seconds of one process, each result counted once."""
    faults = [run for run in runs if isinstance(run, FaultRun)]
    kinds: dict[str, list[Any]] = {
        "faults in every layer": [run for run in faults if run.layer is None],
        "faults in one layer": [run for run in faults if run.layer is not None],
        "healthy runs": [run for run in runs if isinstance(run, HealthyRun)],
    }
    return ", ".join(
        f"{len(some)} {kind} {sum(run.seconds for run in some):.0f} s"
        for kind, some in kinds.items()
        if some
    )


def lines(certificate: Certificate) -> Iterator[str]:
    """Yield the certificate line by line."""
    c = certificate
    yield f"certificate {c.digest[:12]}: {c.target}, {c.dtype}, factors {c.factors[:12]}"
    if c.sample:
        yield f"  a sample only: {c.sample}"
    yield f"  faults caught {share(c.total.full)}; by taps alone {share(c.total.envelope_only)}"
    for area, rate in c.kill.items():
        yield f"    {area:12} {share(rate.full)}, by taps alone {rate.envelope_only.count}"
    for survivor in c.survivors:
        yield f"  survivor {survivor.fault} ({survivor.area}): {survivor.why}"
    yield f"  equivalent faults flagged: {share(c.equivalent)}"
    if c.healthy is None:
        yield "  no healthy run: nothing is known about false alarms"
    else:
        h = c.healthy
        yield (
            f"  false alarms {h.flagged} in {h.runs} healthy runs over {h.inputs} inputs, "
            f"{h.flagged_clusters} in {h.clusters} sets of weights: below "
            f"{100 * h.upper_bound:.2g} % with {100 * h.confidence:.0f} % confidence"
        )
        yield from (f"    {alarm}" for alarm in h.alarms)
    a = c.accuracy
    yield f"  exact layer {share(a.layer)}, exact sub-module {share(a.tap)}"
    yield (
        f"  named {share(a.named)}, alone or with faults that do the same here "
        f"{share(a.named_or_alike)}; held out, 'none of these' {share(a.held_out)}"
    )
    for text in c.misplaced:
        yield f"    misplaced {text}"
    for text in c.unnamed:
        yield f"    not named {text}"
    yield f"  published rules on the same logits: faults caught, healthy {c.dtype} runs flagged"
    for name, rival in c.rivals.items():
        yield f"    {name:22} {share(rival.killed)}, {share(rival.flagged)}"
    if c.change is not None:
        yield f"  since the last certificate (factors {c.change.factors}):"
        yield f"    caught now: {', '.join(c.change.gained) or 'nothing new'}"
        yield f"    no longer caught: {', '.join(c.change.lost) or 'nothing'}"
