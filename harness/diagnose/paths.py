"""What shows over a cache only: all checks of the paths at once, against every fault of a past.

Two faults may do the same to a decode step and differ in a chunk, so that the logits of every path
make one long exhibit. The template is what the port does with the fault planted, in float32, less
what its own plain forward gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.diagnose.match import Template
from harness.measure.compare import measure_difference
from harness.measure.oracle import Oracle, Read, stored
from harness.measure.paths import Driver, PathCheck, Piece, evaluate, gather, rows_of, split_checks
from harness.measure.records import Measurement
from harness.measure.run import Case
from harness.measure.statistics import Float, noise_scale
from harness.measure.taps import Place
from harness.subjects.protocol import Array, path_capabilities

COLUMNS = 256
"""Most logits of a position that are looked at, spread evenly over the vocabulary."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PathExhibit:
    """The paths of a subject, ``(rows, columns)``: every position of every piece of every check.

    Attributes
    ----------
    ids
        What ran, int32 ``(batch, seq)``.
    checks
        The relations that the subject offers.
    observed, golden, orders
        ``observed`` is the golden plus what the path differs by from the subject's own forward;
        ``orders`` are the golden plus the difference of two legitimate evaluations.
    noise
        Expected of each element.
    measure
        From observed and expected to a measurement.
    """

    ids: Array
    checks: tuple[PathCheck, ...]
    observed: Float
    golden: Float
    orders: tuple[Float, ...]
    noise: Float
    measure: Callable[[Float, Float], Measurement]


def path_exhibit(oracle: Oracle, subject: Any, cases: Sequence[Case], place: Place) -> PathExhibit:
    """Ask a subject for all of its paths.

    Raises
    ------
    SubjectFailure
        If the subject fails.
    """
    config = oracle.config
    checks, _ = split_checks(path_capabilities(subject), config)
    ids = rows_of(cases, config.max_seq_len, config.vocab_size)
    difference, pieces = _differences(subject, ids, checks, config)
    columns = _columns(config)
    truth, others = evaluate(oracle, ids)
    golden = gather(truth[..., columns], pieces)
    orders = [gather(other[..., columns], pieces) for other in others]

    def measure(seen: Float, expected: Float) -> Measurement:
        return measure_difference(place, "paths", seen, expected, golden, orders)

    pairs = tuple(golden + (orders[i] - orders[j]) for i in range(len(orders)) for j in range(i))
    noise = noise_scale(golden, orders, oracle.storage)
    return PathExhibit(ids, checks, golden + difference, golden, pairs, noise, measure)


def path_templates(
    oracle: Oracle, seen: PathExhibit, config: Any, read: Read, progress: Progress
) -> Iterator[Template]:
    """Yield what every fault of a past makes of the same paths.

    Parameters
    ----------
    oracle
        Says how weights are stored.
    seen
        What the subject did.
    config
        Parsed by the port's room.
    read
        Original tensor name to array.
    progress
        Called with a sentence before each fault.

    Raises
    ------
    MemoryError
        If the weights would not fit in float32 beside what is there.
    """
    from harness.faults.library import library
    from harness.faults.model import PATHS, Planted
    from harness.subjects.relax import Deployed, planted_operations
    from relax_impl.compile import compile_model
    from relax_impl.loader import Parameters, apply, mapping, parameter_shapes
    from relax_impl.runtime import Model

    parameters = None
    for fault in library().values():
        if fault.equivalent or not fault.first_tap.startswith(PATHS):
            continue
        progress(f"diagnosis: paths of {fault.name}")
        operations = planted_operations(Planted(fault), "llvm")
        try:
            compiled = compile_model(config, "float32", "llvm", operations=operations)
        except Exception:
            # A fault that this config has no place for must not cost the others their names.
            continue
        if parameters is None:
            weights = mapping(config, compiled.layout)
            shapes = parameter_shapes(config, compiled.layout)
            _require_memory(4 * sum(int(np.prod(shape)) for shape in shapes.values()))
            held = stored(read, oracle.storage)
            tensors = {name: apply(weights, name, held, "float32") for name in shapes}
            parameters = Parameters(config, "float32", compiled.layout, tensors)
        port = Deployed(Model(compiled, parameters))
        if fault.calls is not None:
            fault.calls(port)
        difference, _ = _differences(port, seen.ids, seen.checks, oracle.config)
        yield Template(fault.name, seen.golden + difference)


def _require_memory(needed: int) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A second copy exists while they are packed and handed over.
    if 2 * needed > free:
        raise MemoryError(f"weights in float32 need {needed / 1e9:.1f} GB, {free / 1e9:.1f} free")


def _columns(config: Any) -> Any:
    count = min(COLUMNS, config.vocab_size)
    return np.linspace(0, config.vocab_size - 1, count).round().astype(int)


def _differences(
    subject: Any, ids: Array, checks: Sequence[PathCheck], config: Any
) -> tuple[Float, list[Piece]]:
    """Return how far every path lies from the plain forward, and where its rows belong."""
    columns = _columns(config)
    driver = Driver(subject, ids, config.vocab_size, config.max_seq_len)
    base = np.asarray(driver.forward(ids))[..., columns].astype(np.float64)
    pieces = [
        Piece(piece.row, piece.first, np.asarray(piece.logits)[:, columns].astype(np.float64))
        for check in checks
        for piece in check.run(driver)
    ]
    seen = np.concatenate([piece.logits for piece in pieces])
    return seen - gather(base, pieces), pieces
