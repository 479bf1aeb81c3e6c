"""Ask one peer for one feature."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cases.exposure import materialise
from harness.errors import BadInput, NotProven
from harness.judge.factors import shipped
from harness.judge.verdict import Row, judge
from harness.measure.oracle import Oracle
from harness.measure.paths import path_events
from harness.measure.records import Failure, Measurement
from harness.measure.run import Case
from harness.peers.cell import OWN, Cell, State
from harness.peers.features import Feature
from harness.pipeline import Material, Request, check, open_material
from harness.report.record import Report
from harness.subjects.load import Loaded, load_subject
from harness.subjects.peers.model import NotSupported
from harness.subjects.peers.registry import PEERS
from harness.subjects.protocol import path_capabilities, rounding_of

Progress = Callable[[str], None]
_LONGEST = 300
"""Characters of a peer's own message that are kept."""


class _PlainForward:
    """A subject without its paths, which are rows of their own, and without what is not probed."""

    protocol = 1

    def __init__(self, subject: Any, *, probe: bool) -> None:
        self._subject = subject
        self._hidden = () if probe else ("attention_bias",)

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(name)
        return getattr(self._subject, name)


def versions(name: str) -> dict[str, str]:
    """Return the versions behind a subject."""
    if name == OWN:
        from importlib.metadata import version

        return {"apache-tvm": version("apache-tvm")}
    return PEERS[name].versions()


def asked_again(name: str, feature: str, dtype: str) -> str:
    """Return the command that asks a cell again."""
    words = ["mpt-conform", "peers", "--only", name, "--feature", feature, "--dtype", dtype]
    return shlex.join(words)


def place(feature: Feature, folder: Path) -> tuple[Path, Path]:
    """Return the checkpoint of a feature and the folder of its prompt, made if they are not there.

    The weights are stored in bfloat16, as the released ones are.
    """
    checkpoint = materialise(feature.exposure, folder, "bfloat16")
    prompts = folder / f"{checkpoint.name}-prompt-{feature.length}"
    prompts.mkdir(exist_ok=True)
    file = prompts / "ids.npy"
    if not file.exists():
        rng = np.random.default_rng([feature.exposure.seed, feature.length])
        vocabulary = feature.exposure.config["vocab_size"]
        np.save(file, rng.integers(0, vocabulary, (1, feature.length)).astype(np.int32))
    return checkpoint, prompts


def ask(name: str, feature: Feature, dtype: str, folder: Path, progress: Progress) -> Cell:
    """Judge one subject on one feature.

    Parameters
    ----------
    name
        `OWN` or a peer.
    folder
        Where checkpoints are kept.
    """
    started = time.perf_counter()
    checkpoint, prompts = place(feature, folder)
    source = name if name == OWN else f"peer:{name}"

    def cell(state: State, **more: Any) -> Cell:
        seconds = round(time.perf_counter() - started, 2)
        return Cell(
            name, feature.name, dtype, state, versions(name),
            seconds=seconds, command=asked_again(name, feature.name, dtype), **more,
        )  # fmt: skip

    if name != OWN:
        reason = PEERS[name].cannot.get(feature.name)
        if reason is not None:
            return cell("not supported", reason=reason)
    try:
        loaded = load_subject(source, checkpoint, dtype=dtype, target="llvm")
    except NotSupported as error:
        return cell("not supported", reason=str(error))
    if loaded.subject is None:
        return cell("refuses", reason=_short(loaded.failure))
    if feature.paths:
        return cell(**_paths(loaded, feature, dtype, checkpoint, prompts))
    given = _PlainForward(loaded.subject, probe=feature.probe)
    request = Request(checkpoint=checkpoint, subject=source, dtype=dtype, prompts=str(prompts))
    try:
        report = check(request, progress, given=given)
    except (BadInput, NotProven) as error:
        return cell("not proven", reason=str(error))
    return cell(**_of_report(report))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _of_report(report: Report) -> dict[str, Any]:
    ratios = [tap.ratio for tap in report.taps if tap.ratio is not None]
    logits = [tap for tap in report.taps if tap.tap == "logits" and tap.mode == "deployed"]
    made: dict[str, Any] = {
        "ratio": max(filter(math.isfinite, ratios), default=None),
        "logit_error": logits[0].relative_error if logits else None,
        "top1": sum(item.top1_agree for item in report.logits) if report.logits else None,
        "positions": sum(item.positions for item in report.logits) if report.logits else None,
    }
    if report.verdict == "conforms":
        return {"state": "conforms", **made}
    if report.verdict == "not-proven":
        return {"state": "not proven", "reason": report.reason, **made}
    if report.failures and not any(tap.verdict == "diverges" for tap in report.taps):
        return {"state": "refuses", "reason": _short(report.failures[0].reason), **made}
    first, found = report.first_divergence, report.diagnosis
    lost = [tensor.tensor for tensor in report.tensors if not tensor.arrived]
    made["first"] = first.tap if first is not None else f"tensor {lost[0]}" if lost else ""
    if found is not None:
        made |= {"fault": found.fault, "alike": found.alike}
        nearest = f"; nearest is {found.nearest}" if found.nearest else ""
        made["reason"] = f"{found.reason}{nearest}" if found.fault is None else ""
    return {"state": "diverges", **made}


def _paths(
    loaded: Loaded, feature: Feature, dtype: str, checkpoint: Path, prompts: Path
) -> dict[str, Any]:
    """Hold the paths over a cache against the subject's own forward."""
    subject: Any = loaded.subject
    if not path_capabilities(subject):
        return {"state": "not supported", "reason": "its subject offers no path over a cache"}
    material: Material = open_material(checkpoint)
    oracle = Oracle(
        material.config, material.checkpoint.read, storage=dtype, rounding=rounding_of(subject)
    )
    case = Case("ids", np.load(prompts / "ids.npy"))
    wanted = {f"paths.{check}" for check in feature.paths}
    rows: list[Row] = []
    for event in path_events(oracle, subject, [case]):
        if isinstance(event, Failure) and event.place.tap in wanted:
            return {"state": "refuses", "reason": _short(event.reason), "first": event.place.path}
        if isinstance(event, Measurement) and event.place.tap in wanted:
            rows.append(judge(event, dtype, shipped()))
    compared = {row.measurement.place.tap for row in rows}
    if compared != wanted:
        return {"state": "not supported", "reason": f"no {', '.join(sorted(wanted - compared))}"}
    ratio = max(row.ratio for row in rows)
    made: dict[str, Any] = {"ratio": ratio if math.isfinite(ratio) else None}
    diverging = [row for row in rows if row.diverges]
    if diverging:
        return {"state": "diverges", "first": diverging[0].measurement.place.path, **made}
    return {"state": "conforms", **made}
