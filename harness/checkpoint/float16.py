"""Conversion of a checkpoint to float16: streaming, resumable, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from harness.checkpoint.dtypes import FLOATS
from harness.checkpoint.float16_report import ConversionRefused, ConversionReport, ConvertedTensor
from harness.checkpoint.float16_state import Partial, exclusively
from harness.checkpoint.pipeline import convert_shard, digest_source
from harness.checkpoint.reader import Checkpoint
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
    with _writing(partial_path), exclusively(destination):
        if os.path.lexists(destination) and not force:
            raise BadInput(
                "the target exists already", where=str(destination), hint="--force replaces it"
            )
        partial = Partial.open(partial_path, _fingerprint(checkpoint, shards))
        kept, read, written = _convert_all(checkpoint, shards, partial, progress)
        report = ConversionReport(
            checkpoint.path,
            destination,
            tuple(s.file for s in shards),
            kept,
            (),
            _converted(checkpoint, shards, partial),
            read,
            written,
            0.0,
        )
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
        raise BadInput(
            f"the conversion stopped: {error.strerror or error}",
            where=str(error.filename or partial),
            hint=f"what is finished stays in {partial}; run again once this is mended",
        ) from error


def _plan(checkpoint: Checkpoint, max_shard_bytes: int) -> tuple[Shard, ...]:
    where = str(checkpoint.path)
    if not checkpoint.tensors:
        raise BadInput("the checkpoint holds no tensor", where=where)
    twice = [name for name, n in Counter(t.name for t in checkpoint.tensors).items() if n > 1]
    if twice:
        raise BadInput(
            f"tensor {twice[0]!r} is there {'twice or more'}",
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


def _fingerprint(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> str:
    """What must be equal for shards of an earlier run to fit; the contents are verified apart."""
    sources = [(t.name, t.dtype, t.shape) for t in checkpoint.tensors]
    headers = [s.header.hex() for s in shards]
    return hashlib.sha256(json.dumps([1, sources, headers]).encode()).hexdigest()


def _convert_all(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial, progress: Progress | None
) -> tuple[tuple[str, ...], int, int]:
    """Convert what is not finished; give the shards kept, the bytes read and those written."""
    kept = _verified(checkpoint, shards, partial)
    partial.clear_all_but(set(kept))
    sizes = {t.name: t.nbytes for t in checkpoint.tensors}
    todo = [s for s in shards if s.file not in kept]
    _require_space(checkpoint, sum(s.nbytes for s in todo), partial.path)
    total = sum(sizes.values())
    done = total - sum(sizes[t.name] for s in todo for t in s.tensors)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    read = total - done
    advance(0)
    for shard in todo:
        record = convert_shard(shard, checkpoint.read, partial.path / shard.file, advance)
        partial.record(shard.file, record)
    return kept, read, sum(s.nbytes for s in todo)


def _verified(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial
) -> tuple[str, ...]:
    """Shards of an earlier run that are whole; none if the source is no longer what it was."""
    for shard in shards:
        known = partial.finished.get(shard.file)
        if known and known.source_digest != digest_source(shard, checkpoint.read):
            partial.start_over()
            return ()
    return tuple(s.file for s in shards if partial.is_intact(s.file))


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


def _converted(
    checkpoint: Checkpoint, shards: tuple[Shard, ...], partial: Partial
) -> tuple[ConvertedTensor, ...]:
    counts = {
        tensor.name: count
        for shard in shards
        for tensor, count in zip(shard.tensors, partial.finished[shard.file].counts, strict=True)
    }
    return tuple(
        ConvertedTensor(t.name, t.dtype, t.size, counts[t.name]) for t in checkpoint.tensors
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
