"""How many faults of the library does ``check`` catch, and where does it first see them?

Every fault is planted and checked on the checkpoint that it names as its exposure, with a short
prompt first; what survives is checked again with the shipped prompts, as ``check`` does by default:

    python benchmarks/kill_rate.py [--area AREA ...] [--record FILE] [NAME ...]

With ``--record``, every result is appended to a file as it comes, one JSON object a line, and what
stands there already is not measured again.

Caught is what ends as ``diverges``. Two ways are counted apart: by a tap, or only because a tensor
did not arrive under its name (the mapper's conservation law, which needs ``parameters()``).
Equivalent mutations stand in their own table: there, caught is a false alarm. A survivor that gives
the very numbers of the healthy port is dead: the library is at fault, not the gate.

In place is what a tap sees in the sub-module that was planted in. The probe of ALiBi measures the
attention of block 0, so that ``alibi`` and that block's ``attn.context`` are one sub-module.

The work of the oracle that is the same for every fault is remembered between checks of one
checkpoint; that changes no number.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from harness.certify.planting import checkpoint_of, prompt
from harness.faults.anchor import shows
from harness.faults.library import library
from harness.faults.model import Fault, Planted
from harness.pipeline import Request, check


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    name: str
    area: str
    exposure: str
    equivalent: bool
    verdict: str
    by_tap: bool
    tensors: int
    expected: str
    found: str
    mode: str
    seconds: float
    reason: str = ""
    shipped_prompts: bool = False
    dead: bool = False

    @property
    def caught(self) -> bool:
        return self.verdict == "diverges"

    @property
    def placed(self) -> bool:
        """Whether a tap saw it first in the sub-module expected."""
        return self.by_tap and _module(self.found) == _module(self.expected)

    @property
    def layered(self) -> bool:
        """Whether a tap saw it first in the layer expected, or at the end expected."""
        return self.by_tap and _layer(self.found) == _layer(self.expected)


def _module(tap: str) -> str:
    return "transformer.blocks.0.attn.context" if tap == "alibi" else tap


def _layer(tap: str) -> str:
    parts = _module(tap).split(".")
    return parts[2] if parts[1:2] == ["blocks"] else tap


@cache
def remember() -> None:
    """Let the oracle answer repeated questions from memory."""
    from harness.measure import oracle, run

    def digest(value: Any) -> Any:
        if hasattr(value, "numpy"):
            array = value.detach().cpu().numpy()
            return (str(array.dtype), array.shape, hash(array.tobytes()))
        return value

    def wrap(owner: Any, name: str, key: Any) -> None:
        plain, kept = getattr(owner, name), {}

        def remembered(self: Any, *arguments: Any) -> Any:
            at = (*key(self), *(digest(a) for a in arguments))
            if at not in kept:
                kept[at] = plain(self, *arguments)
            return kept[at]

        setattr(owner, name, remembered)

    # Two checkpoints of one config differ in the stream, which is part of the key.
    wrap(oracle.Part, "chain", lambda p: (p.part, p._oracle.storage, repr(p._oracle.config)))
    wrap(run.Walk, "_order_bias", lambda w: (w.oracle.storage, repr(w.config)))


def measure(exposure: str, names: list[str], prompts: Path | None) -> list[Result]:
    """Check several faults of one exposure in this process."""
    remember()
    where = checkpoint_of(exposure)
    return [_one(library()[name], where, prompts) for name in names]


def _one(fault: Fault, where: Path, prompts: Path | None) -> Result:
    started = time.perf_counter()
    common = {
        "name": fault.name,
        "area": fault.area,
        "exposure": fault.exposure,
        "equivalent": fault.equivalent,
        "expected": Planted(fault).first_place,
        "shipped_prompts": prompts is None,
    }
    try:
        source = None if prompts is None else str(prompts)
        report = check(Request(checkpoint=where, prompts=source, fault=fault.name, diagnose=False))
    except Exception as error:
        seconds = time.perf_counter() - started
        reason = f"{type(error).__name__}: {error}"
        return Result(**common, verdict="error", by_tap=False, tensors=0, found="", mode="",
                      seconds=seconds, reason=reason)  # fmt: skip
    first = report.first_divergence
    survived = report.verdict == "conforms" and not fault.equivalent and prompts is None
    # A subject that cannot be made is caught only by a fault that is expected to do just that.
    broken = first is not None and first.tap == "load" != common["expected"]
    return Result(
        dead=survived and not _shows(fault, where),
        **common,
        verdict="error" if broken else report.verdict,
        by_tap=first is not None,
        tensors=sum(not tensor.arrived for tensor in report.tensors),
        found=first.tap if first else "",
        mode=first.mode if first else "",
        seconds=time.perf_counter() - started,
        reason=(first.reason if first else "") or report.reason,
    )


def _shows(fault: Fault, where: Path) -> bool:
    """Return whether a survivor changes any number at all, in a batch of two."""
    config = json.loads((where / "config.json").read_text())
    shape = (2, min(config["max_seq_len"], 640))
    ids = np.random.default_rng(11).integers(0, config["vocab_size"], shape)
    return shows(Planted(fault), where, ids.astype(np.int32))


def known(record: Path | None, names: set[str]) -> list[Result]:
    """Return the results of an earlier run that was cut short."""
    if record is None or not record.exists():
        return []
    found = [Result(**json.loads(line)) for line in record.read_text().splitlines()]
    return [result for result in found if result.name in names]


def unsettled(result: Result | None, shipped: bool) -> bool:
    """Return whether a fault is to be checked in the first pass, or in the one with all prompts."""
    if not shipped:
        return result is None
    return result is not None and not (result.caught or result.equivalent or result.shipped_prompts)


def chunks(faults: list[Fault], size: int) -> list[tuple[str, list[str]]]:
    """Group faults by exposure, the longest group first, in pieces of ``size``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for fault in faults:
        groups[fault.exposure].append(fault.name)
    pieces = [
        (exposure, names[at : at + size])
        for exposure, names in groups.items()
        for at in range(0, len(names), size)
    ]
    return sorted(pieces, key=lambda piece: -len(piece[1]))


def show(results: list[Result], seconds: float) -> None:
    """Print the table, the rates and what went wrong."""
    for r in results:
        mark = " misplaced" * (r.by_tap and not r.equivalent and not r.placed)
        print(f"{r.name:34} {r.verdict:10} {r.found or '-':38} expected {r.expected or '-'}{mark}")
    faults = [r for r in results if not r.equivalent]
    same = [r for r in results if r.equivalent]
    print(f"\n{'area':12} faults caught   rate  by a tap  sub-module  layer")
    for area in [*sorted({r.area for r in faults}), "all"]:
        mine = [r for r in faults if area in (r.area, "all")]
        caught, tapped = sum(r.caught for r in mine), sum(r.by_tap for r in mine)
        print(
            f"{area:12} {len(mine):6} {caught:6} {caught / len(mine):6.1%} {tapped:9} "
            f"{sum(r.placed for r in mine):11} {sum(r.layered for r in mine):6}"
        )

    def names(chosen: Iterable[Result]) -> str:
        return ", ".join(r.name for r in chosen) or "none"

    print("survivors:", names(r for r in faults if not r.caught and not r.dead))
    print("dead:", names(r for r in faults if r.dead))
    print("by arrival only:", names(r for r in faults if r.caught and not r.by_tap))
    print("another sub-module:", names(r for r in faults if r.by_tap and not r.placed))
    print("equivalent:", len(same), "false alarms:", names(r for r in same if r.caught))
    for r in results:
        if r.verdict not in ("diverges", "conforms") or (r.reason and r.equivalent):
            print(f"{r.name}: {r.verdict}: {r.reason}")
    print(f"{seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--area", action="append")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    chosen = [
        fault
        for fault in library().values()
        if (not options.names or fault.name in options.names)
        and (not options.area or fault.area in options.area)
    ]
    started = time.perf_counter()
    results = {r.name: r for r in known(options.record, {fault.name for fault in chosen})}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for shipped in (False, True):
            waiting = [fault for fault in chosen if unsettled(results.get(fault.name), shipped)]
            with tempfile.TemporaryDirectory() as directory:
                prompts = {
                    exposure: None if shipped else prompt(exposure, Path(directory))
                    for exposure in {fault.exposure for fault in waiting}
                }
                futures = [
                    pool.submit(measure, exposure, names, prompts[exposure])
                    for exposure, names in chunks(waiting, 1 if shipped else 4)
                ]
                for future in as_completed(futures):
                    results |= {r.name: r for r in future.result()}
                    if options.record:
                        with options.record.open("a") as file:
                            file.writelines(json.dumps(asdict(r)) + "\n" for r in future.result())
                    print(f"{len(results)} of {len(chosen)}", flush=True)
    order = {name: i for i, name in enumerate(library())}
    show(sorted(results.values(), key=lambda r: order[r.name]), time.perf_counter() - started)


if __name__ == "__main__":
    main()
