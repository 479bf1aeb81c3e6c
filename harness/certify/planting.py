"""The faults of the library through the gate, one by one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.certify.observe import Observation, observe, remember
from harness.certify.results import FaultRun
from harness.diagnose.inquiry import Inquiry
from harness.diagnose.stage import diagnose
from harness.faults.library import STRENGTHS, library
from harness.faults.model import Fault, Planted
from harness.pipeline import SHIPPED, Evidence, Request, check
from harness.report.record import DiagnosisRecord

LENGTH = 96
"""Tokens of the first prompt; what survives is checked again with the shipped ones."""
SEED = 7


def mechanism(name: str) -> frozenset[str]:
    """Return a fault with the other strengths of its mechanism."""
    for names in STRENGTHS.values():
        if name in names:
            return frozenset(names)
    return frozenset({name})


def exposure_folder() -> Path:
    """Where the exposure checkpoints are written."""
    from relax_impl.compile import cache_directory

    return cache_directory() / "exposures"


def checkpoint_of(exposure: str) -> Path:
    """Return the checkpoint that shows a fault; written on the first call."""
    from cases.exposure import materialise

    if exposure == "trained":
        return SHIPPED
    return materialise(exposure, exposure_folder(), "bfloat16")


def confined_layer(fault: Fault) -> int | None:
    """Return a layer other than the first to plant a fault in, or ``None`` if there is none.

    It follows from the name, so that the layers are spread over the library.
    """
    layers = _n_layers(fault.exposure)
    if fault.equivalent or not fault.per_layer or layers < 2:
        return None
    if fault.first_layer:
        return fault.first_layer
    return 1 + sum(fault.name.encode()) % (layers - 1)


def _n_layers(exposure: str) -> int:
    """Return the layers of an exposure; its weights need not be written for that."""
    from cases.exposure import EXPOSURES

    if exposure in EXPOSURES:
        return int(EXPOSURES[exposure].config["n_layers"])
    return int(json.loads((SHIPPED / "config.json").read_text())["n_layers"])


def prompt(exposure: str, directory: Path) -> Path:
    """Write a batch of token ids: held-out text for the trained checkpoint, random ids else."""
    from cases.exposure import EXPOSURES

    config = json.loads((checkpoint_of(exposure) / "config.json").read_text())
    vocab, longest = config["vocab_size"], config["max_seq_len"]
    lengths = EXPOSURES[exposure].lengths if exposure in EXPOSURES else ()
    length = min(longest, max((LENGTH, *lengths)))
    rows = 2 if length <= LENGTH else 1
    ids = np.random.default_rng(SEED).integers(0, vocab, (rows, length))
    if exposure == "trained":
        ids = _text(rows, length)
    # The ends of the vocabulary, which a text does not visit.
    ids[-1, -4:] = (0, 1, vocab - 2, vocab - 1)
    path = directory / f"{exposure}.npy"
    np.save(path, ids)
    return path


def _text(rows: int, length: int) -> Any:
    from tokenizers import Tokenizer

    import cases.prompts

    text = Path(str(cases.prompts.__file__)).with_name("long.txt").read_text()
    tokens = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids
    return np.array(tokens[: rows * length]).reshape(rows, length)


def plant(name: str, layer: int | None, dtype: str, target: str, directory: Path) -> FaultRun:
    """Plant one fault and check; what survives is checked again with the shipped prompts."""
    fault = library()[name]
    _turn_to(fault.exposure)
    planted = Planted(fault, layer)
    first = _one(planted, dtype, target, str(prompt(fault.exposure, directory)))
    if first.killed or fault.equivalent:
        return first
    second = _one(planted, dtype, target, None)
    return replace(second, seconds=first.seconds + second.seconds)


def _turn_to(exposure: str) -> None:
    """Keep in memory what belongs to one checkpoint, and nothing of the one before."""
    forget = remember()
    if _remembered[-1:] != [exposure]:
        forget()
        _remembered.append(exposure)


_remembered: list[str] = []


def _held_out(inquiry: Inquiry, fault: str, found: DiagnosisRecord | None) -> str | None:
    """Name a fault that the library does not have, nor one that does the same here.

    Another strength of its mechanism would be the right answer, and so would a twin: what cannot be
    told from it by anything that the subject computed.
    """
    names = frozenset({found.fault, *found.alike}) if found and found.fault else frozenset()
    twins = names if fault in names else frozenset()
    return diagnose(replace(inquiry, excluded=mechanism(fault) | twins)).fault


def _one(planted: Planted, dtype: str, target: str, prompts: str | None) -> FaultRun:
    fault = planted.fault
    started = time.perf_counter()
    seen: list[tuple[Observation, Inquiry | None]] = []
    request = Request(
        checkpoint=checkpoint_of(fault.exposure),
        prompts=prompts,
        fault=planted.label,
        dtype=dtype,
        target=target,
    )

    def keep(evidence: Evidence) -> None:
        seen.append((observe(evidence), evidence.inquiry))

    blank = FaultRun(
        fault=fault.name,
        layer=planted.layer,
        area=fault.area,
        exposure=fault.exposure,
        equivalent=fault.equivalent,
        verdict="error",
        by_tap=False,
        lost=0,
        expected=planted.first_place,
        found="",
        mode="",
        ratio=None,
    )
    try:
        report = check(request, witness=keep)
    except Exception as error:
        # One broken fault must not end a campaign of hundreds; it counts as missed.
        spent = time.perf_counter() - started
        return replace(blank, seconds=spent, detail=f"{type(error).__name__}: {error}")
    observation, inquiry = seen[0] if seen else (Observation(None, {}, {}), None)
    first, found = report.first_divergence, report.diagnosis
    return replace(
        blank,
        verdict=report.verdict,
        by_tap=first is not None,
        lost=sum(not tensor.arrived for tensor in report.tensors),
        found=first.tap if first else "",
        mode=first.mode if first else "",
        ratio=observation.ratio,
        ratios=observation.ratios,
        named=found.fault if found else None,
        alike=found.alike if found else (),
        held_out=_held_out(inquiry, fault.name, found)
        if inquiry and not fault.equivalent
        else None,
        rules=observation.rules,
        seconds=time.perf_counter() - started,
        detail=(first.reason if first else "") or report.reason,
    )
