"""Conversion of a checkpoint to float16: streaming, resumable, all or nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from harness.checkpoint.dtypes import FLOATS
from harness.checkpoint.float16_partial import Partial, exclusively
from harness.checkpoint.float16_report import ConversionRefused, ConversionReport, ConvertedTensor
from harness.checkpoint.pipeline import convert_shard, verify_shard
from harness.checkpoint.reader import Checkpoint
from harness.checkpoint.rounding import Counts
from harness.checkpoint.side_files import (
    config_with_dtype,
    copy_side_files,
    size_of_side_files,
)
from harness.checkpoint.writer import (
    Shard,
    plan_shards,
    write_durably,
    write_index,
)
from harness.errors import BadInput

__all__ = ["DEFAULT_SHARD_BYTES", "ConversionRefused", "ConversionReport", "convert", "target_of"]

DEFAULT_SHARD_BYTES = 2_000_000_000
"""Small enough that an interrupted run loses little, large enough for few files."""

Progress = Callable[[int, int], None]


def target_of(source: str | Path) -> Path:
    """Where `source` converts to by default: its sibling ``<name>-float16``."""
    path = Path(os.path.abspath(source))
    return path.with_name(path.name + "-float16")


def convert(
    source: str | Path,
    *,
    target: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    weights_only: bool = False,
    allow_overflow: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the checkpoint in `source` again with float16 weights.

    Floating point tensors are rounded to nearest, ties to even; integers and booleans are copied.
    Names that share a storage are written each. Work goes to ``<target>.partial``, which gets its
    final name when all of it is durable; a run that was interrupted is taken up again.

    Parameters
    ----------
    source
        A checkpoint directory.
    target
        The directory to make; `target_of` the source by default.
    max_shard_bytes
        Most bytes of tensor data in a shard.
    weights_only
        Write weights and ``config.json``, and leave the files beside them behind.
    allow_overflow
        Accept weights that are infinite or NaN in float16.
    force
        Replace a target that exists.
    progress
        Called with the source bytes done and their total.

    Returns
    -------
    ConversionReport
        What was written, and what rounding did to it.

    Raises
    ------
    ConversionRefused
        Weights that are not finite in float16, without `allow_overflow`; finished shards are kept
        for a run with it.
    BadInput
        The source cannot be converted, the target exists or is being written, or the disk
        refuses. Nothing is left under the target's name.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    shards = _plan(checkpoint, max_shard_bytes)
    destination = Path(os.path.abspath(target)) if target is not None else target_of(source)
    if destination.is_relative_to(checkpoint.path.resolve()):
        raise BadInput("the target lies within the source", where=str(destination))
    partial_path = destination.with_name(destination.name + ".partial")
    with _writing(partial_path), exclusively(destination), ExitStack() as stack:
        if os.path.lexists(destination) and not force:
            raise BadInput(
                "the target exists already", where=str(destination), hint="--force replaces it"
            )
        partial = stack.enter_context(Partial.open(partial_path))
        counts, written = _convert_all(checkpoint, shards, partial, progress)
        report = _report(checkpoint, destination, shards, counts, written)
        if not allow_overflow and (report.totals.overflowed or report.totals.not_finite):
            raise ConversionRefused(report, partial_path)
        side_files = _finish(checkpoint, shards, partial, weights_only)
        partial.publish(destination)
    return replace(report, side_files=side_files, seconds=time.perf_counter() - started)


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turn the operating system's refusal into one sentence."""
    try:
        yield
    except OSError as error:
        kept = f"what is finished stays in {partial}; run again once this is mended"
        raise BadInput(
            f"the conversion stopped: {error.strerror or error}",
            where=str(error.filename or partial),
            hint=kept if partial.exists() else None,
        ) from error


def _plan(checkpoint: Checkpoint, max_shard_bytes: int) -> tuple[Shard, ...]:
    where = str(checkpoint.path)
    if not checkpoint.tensors:
        raise BadInput("the checkpoint holds no tensor", where=where)
    twice = [name for name, n in Counter(t.name for t in checkpoint.tensors).items() if n > 1]
    if twice:
        raise BadInput(
            f"tensor {twice[0]!r} is there more than once",
            where=where,
            expected="every tensor once",
            found=f"{len(twice)} names several times",
            hint="remove the stray shard",
        )
    if checkpoint.index_missing:
        raise BadInput(
            f"the index promises tensor {checkpoint.index_missing[0]!r}, which its shard lacks",
            where=where,
            found=f"{len(checkpoint.index_missing)} such tensors",
        )
    for tensor in checkpoint.tensors:
        if tensor.dtype.startswith(("float8", "complex")):
            raise BadInput(
                f"tensor {tensor.name!r} is stored as {tensor.dtype}",
                where=str(checkpoint.path / tensor.file),
                expected=f"one of {', '.join(FLOATS)}, an integer or bool",
            )
    return plan_shards(
        (replace(t, dtype="float16" if t.dtype in FLOATS else t.dtype) for t in checkpoint.tensors),
        max_shard_bytes,
    )


def _convert_all(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial, progress: Progress | None
) -> tuple[dict[str, tuple[Counts, ...]], tuple[Shard, ...]]:
    """Convert what is not finished.

    Returns
    -------
    dict
        Counts of every shard's tensors, by shard.
    tuple of Shard
        The shards that this run converted; the others were finished before, and were verified by
        converting the source again and comparing bytes, which a changed source does not pass.
    """
    counts = _verified(checkpoint, shards, partial)
    partial.clear_all_but(set(counts))
    sizes = {t.name: t.nbytes for t in checkpoint.tensors}
    todo = tuple(s for s in shards if s.file not in counts)
    _require_space(checkpoint, sum(s.nbytes for s in todo), partial.path)
    total = sum(sizes.values())
    done = total - sum(sizes[t.name] for s in todo for t in s.tensors)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    advance(0)
    for shard in todo:
        path = partial.path / shard.file
        counts[shard.file] = convert_shard(shard, checkpoint.read, path, advance)
        partial.worth_keeping = True
    return counts, todo


def _verified(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial
) -> dict[str, tuple[Counts, ...]]:
    """Counts of the shards of an earlier run that are what this run would write."""
    kept = {}
    for shard in shards:
        path = partial.path / shard.file
        if path.is_file() and not path.is_symlink():
            counts = verify_shard(shard, checkpoint.read, path)
            if counts is not None:
                kept[shard.file] = counts
                partial.worth_keeping = True
    return kept


def _require_space(checkpoint: Checkpoint, shards: int, directory: Path) -> None:
    needed = shards + size_of_side_files(checkpoint.path)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise BadInput(
            "the disk has too little space left",
            where=str(directory),
            expected=f"{needed} bytes free",
            found=free,
            hint="free some and run again",
        )


def _finish(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial, weights_only: bool
) -> tuple[str, ...]:
    """Add what belongs beside the shards."""
    copied = () if weights_only else copy_side_files(checkpoint.path, partial.path)
    config = config_with_dtype(checkpoint.path / "config.json", "float16")
    write_durably(partial.path / "config.json", config)
    write_index(partial.path, shards)
    return copied


def _report(
    checkpoint: Checkpoint,
    target: Path,
    shards: tuple[Shard, ...],
    counts: dict[str, tuple[Counts, ...]],
    written: tuple[Shard, ...],
) -> ConversionReport:
    of = {t.name: c for s in shards for t, c in zip(s.tensors, counts[s.file], strict=True)}
    sizes = {t.name: t.nbytes for t in checkpoint.tensors}
    return ConversionReport(
        source=checkpoint.path,
        target=target,
        shards=tuple(s.file for s in shards),
        kept_shards=tuple(s.file for s in shards if s not in written),
        side_files=(),
        tensors=tuple(
            ConvertedTensor(t.name, t.dtype, t.size, of[t.name]) for t in checkpoint.tensors
        ),
        bytes_read=sum(sizes[t.name] for s in written for t in s.tensors),
        bytes_written=sum(s.nbytes for s in written),
        seconds=0.0,
    )
