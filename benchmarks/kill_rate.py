"""How many faults of the library does ``check`` catch, and where does it first see them?

Every fault is planted and checked on the checkpoint that it names as its exposure, with a short
prompt first; what survives is checked again with the shipped prompts, as ``check`` does by default:

    python benchmarks/kill_rate.py [--area AREA ...] [--record FILE] [NAME ...]

With ``--record``, every result is appended to a file as it comes, one JSON object a line, and what
stands there already is not measured again.

Caught is what ends as ``diverges``. Two ways are counted apart: by a tap, or only because a tensor
did not arrive under its name (the mapper's conservation law, which needs ``parameters()``).
Equivalent mutations stand in their own table: there, caught is a false alarm.

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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from cases.exposure import EXPOSURES, materialise
from harness.faults.library import library
from harness.faults.model import Fault, Planted
from harness.pipeline import SHIPPED, Request, check

LENGTH = 96


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

    @property
    def caught(self) -> bool:
        return self.verdict == "diverges"

    @property
    def misplaced(self) -> bool:
        return self.by_tap and self.found != self.expected


def folder() -> Path:
    from relax_impl.compile import cache_directory

    return cache_directory() / "exposures"


def checkpoint(exposure: str) -> Path:
    return SHIPPED if exposure == "trained" else materialise(exposure, folder(), "bfloat16")


def prompt(exposure: str, directory: Path) -> Path:
    """Write a batch of two rows: held-out text for the trained one, random ids for the others."""
    config = json.loads((checkpoint(exposure) / "config.json").read_text())
    vocab, longest = config["vocab_size"], config["max_seq_len"]
    length = min(
        longest, max((LENGTH, *EXPOSURES[exposure].lengths)) if exposure in EXPOSURES else LENGTH
    )
    rows = 2 if length <= LENGTH else 1
    ids = np.random.default_rng(7).integers(0, vocab, (rows, length))
    if exposure == "trained":
        from tokenizers import Tokenizer

        import cases.prompts

        text = Path(cases.prompts.__file__).with_name("long.txt").read_text()
        tokens = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids
        ids = np.array(tokens[: rows * length]).reshape(rows, length)
    # The ends of the vocabulary, which a text does not visit.
    ids[-1, -4:] = (0, 1, vocab - 2, vocab - 1)
    path = directory / f"{exposure}.npy"
    np.save(path, ids)
    return path


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
    where = checkpoint(exposure)
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
        report = check(Request(checkpoint=where, prompts=source, fault=fault.name))
    except Exception as error:
        seconds = time.perf_counter() - started
        reason = f"{type(error).__name__}: {error}"
        return Result(**common, verdict="error", by_tap=False, tensors=0, found="", mode="",
                      seconds=seconds, reason=reason)  # fmt: skip
    first = report.first_divergence
    return Result(
        **common,
        verdict=report.verdict,
        by_tap=first is not None,
        tensors=sum(not tensor.arrived for tensor in report.tensors),
        found=first.tap if first else "",
        mode=first.mode if first else "",
        seconds=time.perf_counter() - started,
        reason=(first.reason if first else "") or report.reason,
    )


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
        mark = " misplaced" * r.misplaced
        print(f"{r.name:34} {r.verdict:10} {r.found or '-':38} expected {r.expected or '-'}{mark}")
    faults = [r for r in results if not r.equivalent]
    same = [r for r in results if r.equivalent]
    print()
    for area in sorted({r.area for r in faults}):
        mine = [r for r in faults if r.area == area]
        counts = [sum(r.caught for r in mine), len(mine), sum(r.by_tap for r in mine)]
        placed = sum(r.by_tap and not r.misplaced for r in mine)
        print(
            f"{area:12} {counts[0]:3} of {counts[1]:3} caught, {counts[2]:3} by a tap, "
            f"{placed:3} in place"
        )
    caught, tapped = sum(r.caught for r in faults), sum(r.by_tap for r in faults)
    print(f"{'all':12} {caught:3} of {len(faults):3} caught, {tapped:3} by a tap")
    print("survivors:", ", ".join(r.name for r in faults if not r.caught) or "none")
    print(
        "by arrival only:", ", ".join(r.name for r in faults if r.caught and not r.by_tap) or "none"
    )
    print("equivalent:", len(same), "false alarms:",
          ", ".join(r.name for r in same if r.caught) or "none")  # fmt: skip
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
