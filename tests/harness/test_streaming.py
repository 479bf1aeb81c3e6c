"""A check block by block: the same verdict and the same numbers, and one layer in memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import memory, streaming
from harness.measure.paths import CHECKS
from harness.memory import Room, room
from harness.streaming import Need, choose
from harness.subjects.protocol import PATH_METHODS

Conform = Callable[..., Any]
CACHED = set(PATH_METHODS) - {"attend"}
GIB = 2**30


def taps(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(tap["tap"], tap["mode"]): tap for tap in report["taps"]}


@pytest.mark.parametrize(
    ("subject", "dtype", "widened"),
    [
        ("relax", "float16", True),
        ("relax", "float16", False),
        ("torch", "bfloat16", False),
        ("torch", "float32", True),
    ],
)
def test_the_numbers_are_those_of_a_check_of_the_whole(
    conform: Conform,
    checkpoint: Path,
    ids: Path,
    monkeypatch: pytest.MonkeyPatch,
    subject: str,
    dtype: str,
    widened: bool,
) -> None:
    what = ("check", checkpoint, "--subject", subject, "--dtype", dtype, "--prompts", ids)
    whole = conform(*what, "--no-stream")
    if not widened:
        # As for a model whose blocks are too large to be held in float64.
        monkeypatch.setattr("harness.measure.oracle.WIDENED", 0)
    streamed = conform(*what, "--stream")
    assert (whole.code, streamed.code) == (0, 0), streamed.out + streamed.err
    expected, found = taps(whole.report), taps(streamed.report)
    # Without a cache over all layers its paths are left out; nothing else is.
    left = {place for place in expected if place not in found}
    needs = {f"paths.{check.name}" for check in CHECKS}
    assert {tap for tap, _ in left} == (needs if subject == "relax" else set())
    assert found == {place: expected[place] for place in found}
    for part in ("tensors", "logits", "conversion", "first_divergence", "verdict"):
        assert streamed.report[part] == whole.report[part], part
    for name, axis in whole.report["compared"].items():
        mine = streamed.report["compared"][name]
        assert mine["expected"] == axis["expected"]
        omitted = sum(skip["count"] for skip in mine["skipped"])
        assert mine["compared"] + omitted == axis["compared"]
        assert (omitted > 0) == (name == "paths" and subject == "relax")


def test_a_fault_is_found_in_the_same_place(conform: Conform, checkpoint: Path, ids: Path) -> None:
    what = ("check", checkpoint, "--prompts", ids, "--fault", "softmax-scale-twice@1")
    whole, streamed = conform(*what), conform(*what, "--stream")
    assert (whole.code, streamed.code) == (1, 1)
    assert streamed.first == whole.first
    found = taps(streamed.report)
    assert found == {place: taps(whole.report)[place] for place in found}


def test_the_report_says_what_was_left_out_and_how_to_repeat_it(
    conform: Conform, checkpoint: Path, ids: Path
) -> None:
    run = conform("check", checkpoint, "--prompts", ids, "--stream")
    assert "weights were read block by block, as --stream asks" in run.out
    assert "13 left out: block by block there is no cache over all layers" in run.out
    assert "planted faults, where nothing is left out (llvm, float16)" in run.out
    assert run.report["reproduce"].endswith(" --stream")
    assert set(run.report["subject"]["lacks"]) == CACHED


def test_what_does_not_fit_is_streamed_unasked(
    conform: Conform, checkpoint: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = ("check", checkpoint, "--prompts", ids)
    assert "paths" in conform(*what).report["compared"]
    monkeypatch.setattr(streaming, "room", lambda: Room(1000, "ulimit -v"))
    run = conform(*what)
    assert run.code == 0
    (note,) = (n for n in run.report["checkpoint"]["notes"] if "block by block" in n)
    assert "0 MB were left (ulimit -v)" in note
    assert run.report["compared"]["paths"]["skipped"]
    # Asked for, the whole is checked whatever the forecast says.
    assert not conform(*what, "--no-stream").report["compared"]["paths"]["skipped"]
    # What loads its weights itself is not refused, and not streamed.
    other = conform(*what, "--subject", "transformers")
    assert other.code == 0
    assert not any("block by block" in note for note in other.report["checkpoint"]["notes"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 74.5 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
    ],
)
@pytest.mark.parametrize("method", ["", "forward", "block", "parameters"])
def test_running_out_of_memory_proves_nothing(
    conform: Conform,
    made: Callable[[Callable[..., Any]], str],
    checkpoint: Path,
    ids: Path,
    method: str,
    error: Exception,
) -> None:
    from harness.subjects.torch import load

    def fail(*arguments: object) -> None:
        raise error

    def short(path: Path, *, dtype: str, target: str) -> Any:
        subject = load(path, dtype=dtype, target=target)
        setattr(subject, method, fail) if method else fail()
        return subject

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(short))
    assert run.code == 3
    assert "the memory does not suffice (--stream holds one block at a time" in run.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--subject", "transformers"), "expected relax or torch"),
        (("--fault", "fork-shares-cache"), "--no-stream"),
        (("--bundle", "x"), "a bundle holds the whole model"),
        (("--traces", "x.safetensors"), "has no effect on a dump"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_a_sentence(
    conform: Conform, checkpoint: Path, options: tuple[str, ...], words: str
) -> None:
    run = conform("check", checkpoint, "--stream", *options)
    assert run.code == 2
    assert words in run.err
    assert "Traceback" not in run.err


def test_one_layer_is_held_at_a_time(checkpoint: Path) -> None:
    from harness.subjects.relax import StreamedRelaxSubject

    subject = StreamedRelaxSubject(checkpoint, "float16", "llvm")
    held = subject._model.weights._held
    for layer in (0, 1):
        subject.block(layer, np.zeros((1, 3, 48), np.float16))
        assert all(name.startswith(f"transformer.blocks.{layer}.") for name in held)
        assert len(held) == 6
    subject.forward(np.zeros((1, 3), np.int32))
    assert set(held) == {"transformer.wte.weight", "transformer.norm_f.weight"}
    assert not hasattr(subject, "prefill")


@pytest.mark.parametrize(
    ("asked", "can", "whole", "stream"),
    [
        (None, True, 6 * GIB, False),
        (None, True, 6 * GIB + 1, True),
        (None, False, 7 * GIB, False),
        (True, True, 1, True),
        (False, True, 7 * GIB, False),
    ],
)
def test_the_rule(asked: bool | None, can: bool, whole: int, stream: bool) -> None:
    choice = choose(asked, can, Need(whole, 5 * GIB), Room(6 * GIB, "ulimit -d"))
    assert choice.stream == stream
    assert bool(choice.note) == stream
    assert ("--max-tokens" in choice.sentence) == (not stream and whole > 6 * GIB)


def machine(folder: Path, group: str) -> tuple[Path, Path]:
    proc, groups = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable:   16777216 kB\n")
    (proc / "self" / "status").write_text("VmSize:  1048576 kB\nVmData:   524288 kB\n")
    (proc / "self" / "cgroup").write_text(group)
    groups.mkdir()
    return proc, groups


def test_room_is_what_the_machine_has(tmp_path: Path) -> None:
    assert room(*machine(tmp_path, "0::/\n")) == Room(16 * GIB, "memory of this machine")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("at", ["a", "a/b"])
def test_room_is_what_a_control_group_or_one_above_it_leaves(
    tmp_path: Path, version: int, at: str
) -> None:
    line = "0::/a/b\n" if version == 2 else "7:cpu:/x\n4:cpuset,memory:/a/b\n"
    proc, groups = machine(tmp_path, line)
    most, used, base = (
        ("memory.max", "memory.current", groups)
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", groups / "memory")
    )
    (base / "a" / "b").mkdir(parents=True)
    for place in ("a", "a/b"):
        limited = place == at
        # "max" and a number near 2^63 are how the two versions say that there is no limit.
        unlimited = "max" if version == 2 else "9223372036854771712"
        (base / place / most).write_text(str(6 * GIB) if limited else unlimited)
        (base / place / used).write_text(str(2 * GIB))
        (base / place / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert room(proc, groups) == Room(5 * GIB, "its control group (cgroup)")


@pytest.mark.parametrize(
    ("kind", "used", "name"),
    [
        (resource.RLIMIT_AS, GIB, "ulimit -v"),
        (resource.RLIMIT_DATA, GIB // 2, "ulimit -d"),
    ],
)
def test_room_is_what_ulimit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, used: int, name: str
) -> None:
    limits = {kind: (3 * GIB, 3 * GIB)}
    nothing = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda asked: limits.get(asked, nothing))
    assert room(*machine(tmp_path, "0::/\n")) == Room(3 * GIB - used, name)


def test_room_without_anything_to_read_is_no_limit(tmp_path: Path) -> None:
    assert room(tmp_path, tmp_path).free >= 2**60
