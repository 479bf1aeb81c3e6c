"""Two dumps: equal bit by bit, or each judged against the golden of a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.compare import Comparison, DumpRow, Judged
from harness.errors import BadInput
from harness.measure.taps import BLOCK_PREFIX, block_widths
from harness.measure.traces import IDS, RawDump, read_dump
from harness.subjects.protocol import STORAGE_DTYPES, Array

_BEFORE = ("transformer.wte", "transformer.wpe", "alibi")
_AFTER = ("transformer.norm_f", "logits", "forward")
# Only the order of the taps is asked for here; the widths are not used.
_IN_BLOCK = tuple(
    block_widths(
        SimpleNamespace(
            qk_ln=True, d_model=1, n_heads=1, n_layers=1, kv_n_heads=1, head_dim=1, hidden_dim=1,
            vocab_size=1, has_wpe=True,
        )
    )
)  # fmt: skip


def compare_dumps(a: Path, b: Path, checkpoint: Path | None) -> Comparison:
    """Compare tensor by tensor.

    Raises
    ------
    BadInput
        If a file is no dump, or they are of two dtypes, checkpoints or inputs.
    """
    one, other = read_dump(a), read_dump(b)
    _require_comparable(a, b, one, other)
    held_a, held_b = _flat(one), _flat(other)
    shared = sorted(held_a.keys() & held_b.keys(), key=lambda key: _position(key[1], key[0]))
    rows = tuple(_row(key, held_a[key], held_b[key]) for key in shared)
    judged: tuple[Judged, ...] = ()
    if checkpoint is not None and shared:
        judged, noise = _judge(checkpoint, (a, b), _dtype(one))
        rows = tuple(
            row if row.same else replace(row, noise=noise.get((row.case, row.tap))) for row in rows
        )
    result = Comparison(
        verdict="",
        kind="dumps",
        reason="",
        a=str(a),
        b=str(b),
        rows=rows,
        only_a=tuple("/".join(key) for key in held_a if key not in held_b),
        only_b=tuple("/".join(key) for key in held_b if key not in held_a),
        judged=judged,
    )
    verdict, reason = _verdict(result, shared, held_a, held_b)
    return replace(result, verdict=verdict, reason=reason)


_Key = tuple[str, str]


def _verdict(
    result: Comparison, shared: list[_Key], a: Mapping[_Key, Array], b: Mapping[_Key, Array]
) -> tuple[str, str]:
    if not shared:
        return "not-proven", "the dumps have no tap of a case in common"
    for side in result.judged:
        if side.verdict == "diverges":
            return "diverges", f"{side.path} diverges from the golden at {side.first_divergence}"
    for key in shared:
        if not (np.isfinite(_wide(a[key])).all() and np.isfinite(_wide(b[key])).all()):
            return "diverges", f"{'/'.join(key)} is not finite"
    if any(a[key].size == 0 for key in shared):
        return "not-proven", "some tensors are empty"
    apart = [row for row in result.rows if isinstance(row, DumpRow) and not row.same]
    if result.only_a or result.only_b:
        count = len(result.only_a) + len(result.only_b)
        return "not-proven", f"{count} tensors are in one of the dumps only"
    if not apart and not result.judged:
        return "conforms", f"{len(shared)} tensors are equal bit by bit"
    if not result.judged:
        return (
            "not-proven",
            f"{len(apart)} of {len(shared)} tensors differ, first {apart[0].case}/{apart[0].tap}; "
            "only a checkpoint can say whether by more than rounding (--checkpoint)",
        )
    if any(side.verdict != "conforms" for side in result.judged):
        return "not-proven", "a dump lacks too much to be judged"
    same = "equal bit by bit" if not apart else f"apart in {len(apart)} of {len(shared)} tensors"
    return "conforms", f"both conform to the golden and are {same}"


def _require_comparable(a: Path, b: Path, one: RawDump, other: RawDump) -> None:
    where = f"{a} and {b}"
    for what, first, second in (
        ("storage dtypes", _dtype(one), _dtype(other)),
        ("checkpoints", one.metadata.get("checkpoint"), other.metadata.get("checkpoint")),
    ):
        if first is not None and second is not None and first != second:
            raise BadInput(
                f"the dumps are of two {what}",
                where=where,
                expected=f"{first[:12]} in both",
                found=second[:12],
            )
    for case in one.arrays.keys() & other.arrays.keys():
        ids = [np.atleast_2d(raw.arrays[case].get(IDS, np.zeros(0))) for raw in (one, other)]
        if not np.array_equal(ids[0], ids[1]):
            raise BadInput(
                f"case {case!r} has different token ids in the two dumps",
                where=where,
                expected="the same input",
            )


def _dtype(raw: RawDump) -> str:
    """Return the stated storage dtype, or that of most taps."""
    if "dtype" in raw.metadata:
        return raw.metadata["dtype"]
    found = Counter(
        array.dtype.name
        for taps in raw.arrays.values()
        for array in taps.values()
        if array.dtype.name in STORAGE_DTYPES
    )
    return found.most_common(1)[0][0] if found else "float32"


def _flat(raw: RawDump) -> dict[_Key, Array]:
    return {
        (case, tap): array
        for case, taps in raw.arrays.items()
        for tap, array in taps.items()
        if tap != IDS
    }


def _position(tap: str, case: str) -> tuple[int, int, int, str, str]:
    """Return where a tap comes in the order of evaluation, without a config."""
    prefix, _, rest = tap.partition(f"{BLOCK_PREFIX}.")
    if not prefix and rest:
        layer, _, name = rest.partition(".")
        within = _IN_BLOCK.index(name) if name in _IN_BLOCK else len(_IN_BLOCK)
        return 1, int(layer) if layer.isdigit() else -1, within, tap, case
    if tap in _BEFORE:
        return 0, 0, _BEFORE.index(tap), tap, case
    return 2, 0, _AFTER.index(tap) if tap in _AFTER else len(_AFTER), tap, case


def _wide(array: Array) -> Array:
    return np.asarray(array).astype(np.float64)


def _row(key: _Key, a: Array, b: Array) -> DumpRow:
    case, tap = key
    if a.shape != b.shape:
        note = f"shape {a.shape} in one, {b.shape} in the other"
        return DumpRow(case, tap, False, max(a.size, b.size), max(a.size, b.size), None, note=note)
    if a.dtype == b.dtype:
        bits = np.dtype(f"u{a.dtype.itemsize}")
        apart = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    else:
        apart = _wide(a) != _wide(b)
    if not apart.any():
        return DumpRow(case, tap, True, 0, a.size, 0.0)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(_wide(a) - _wide(b)).max())
    known = largest if math.isfinite(largest) else None
    return DumpRow(case, tap, False, int(apart.sum()), a.size, known)


def _judge(
    checkpoint: Path, paths: tuple[Path, Path], dtype: str
) -> tuple[tuple[Judged, ...], dict[_Key, float]]:
    """Judge both dumps on the checkpoint, and measure their difference in its noise."""
    from harness.checkpoint.reader import Checkpoint
    from harness.measure.difference import differences
    from harness.measure.oracle import Oracle
    from harness.measure.traces import Dump
    from harness.pipeline import Request, check, parse_config
    from harness.report.terminal import place

    judged = []
    for path in paths:
        report = check(Request(checkpoint=checkpoint, traces=path, dtype=dtype))
        found = report.first_divergence
        judged.append(Judged(str(path), report.verdict, place(found) if found else ""))
    opened = Checkpoint.open(checkpoint)
    config: Any = parse_config(opened.config, str(checkpoint / "config.json"))
    one, other = (Dump.open(path, config, dtype) for path in paths)
    oracle = Oracle(config, opened.read, storage=dtype, rounding=one.subject.rounding)
    cases = [case for case in one.cases if case.name in other.taps]
    noise = {
        (measured.prompt, measured.place.path): measured.observed.rms
        for measured in differences(oracle, one, other, cases)
    }
    return tuple(judged), noise
