"""What a ``pytorch_model*.bin`` holds: a zip of one pickle and the storages' raw bytes."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from harness.checkpoint.entry import Entry, TensorInfo, reading
from harness.checkpoint.pickled import (
    Pairs,
    TensorRef,
    UnsafePickle,
    describe,
    interpret,
)
from harness.errors import BadInput

_MAX_PICKLE = 2**28
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def list_pytorch(path: Path) -> tuple[Entry, ...]:
    """List every tensor of a PyTorch zip file without reading its data or executing its pickle.

    Tensors that share a storage (a tied ``lm_head.weight``) are listed each, at the same offset.

    Raises
    ------
    BadInput
        The file is truncated, in the format that preceded PyTorch 1.6, compressed, big-endian, or
        holds anything else than a flat dict of named tensors.
    """
    with reading(path), path.open("rb") as file:
        lead = file.read(4)
        if not lead:
            raise BadInput("the file is empty", where=str(path), expected="a PyTorch checkpoint")
        if lead != b"PK\x03\x04":
            raise BadInput(
                "the file is no PyTorch zip checkpoint; if PyTorch older than 1.6 wrote it, it is "
                "a bare pickle, which cannot be read tensor by tensor",
                where=str(path),
                hint="save it again: torch.save(torch.load(f, weights_only=True), f)",
            )
        try:
            with zipfile.ZipFile(file) as archive:
                records = _records(path, file, archive)
                root, pickle = _pickle(path, archive)
        except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError) as error:
            raise BadInput(f"the file is truncated or damaged: {error}", where=str(path)) from error
        try:
            state = interpret(pickle)
        except UnsafePickle as error:
            raise BadInput(
                str(error), where=str(path), hint="nothing of the file was executed"
            ) from error
    return _entries(path, state, root, records)


def _records(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every record's raw data, after checking that it is raw."""
    size = path.stat().st_size
    found: dict[str, tuple[int, int]] = {}
    for member in archive.infolist():
        name = member.filename
        if name in found:
            raise BadInput(f"the archive has the record {name!r} twice", where=str(path))
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise BadInput(
                f"the record {name!r} is compressed or encrypted",
                where=str(path),
                expected="stored bytes, as torch.save writes them",
            )
        file.seek(member.header_offset)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if magic != b"PK\x03\x04" or start + member.file_size > size:
            raise BadInput(
                f"the file is truncated or damaged: the record {name!r} does not lie within it",
                where=str(path),
            )
        found[name] = (start, member.file_size)
    return found


def _pickle(path: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    pickles = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
    if len(pickles) != 1:
        raise BadInput(
            "the file is a zip archive but no PyTorch checkpoint",
            where=str(path),
            expected="one record <name>/data.pkl",
            found=pickles or "none",
        )
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(root + "byteorder") if root + "byteorder" in archive.namelist() else b""
    if order not in (b"", b"little"):
        raise BadInput(
            "the weights are stored in another byte order",
            where=str(path),
            expected="little",
            found=repr(order[:16]),
        )
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
        raise BadInput("the pickle is too large for a state dict", where=str(path))
    return root, archive.read(pickles[0])


def _entries(
    path: Path, state: object, root: str, records: dict[str, tuple[int, int]]
) -> tuple[Entry, ...]:
    if not isinstance(state, Pairs):
        raise BadInput(
            f"the file holds {describe(state)}", where=str(path), expected="a dict of tensors"
        )
    entries = []
    for name, value in state.items:
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise BadInput(
                f"the entry {name!r} holds {describe(value)}",
                where=str(path),
                expected="a flat dict from tensor name to tensor",
                hint="save the state dict alone, without optimizer, epoch or nesting",
            )
        entries.append(_entry(path, name, value, records.get(f"{root}data/{value.storage.key}")))
    return tuple(entries)


def _entry(path: Path, name: str, ref: TensorRef, record: tuple[int, int] | None) -> Entry:
    if record is None:
        raise BadInput(
            f"tensor {name!r}: its bytes are missing from the archive",
            where=str(path),
            expected=f"a record data/{ref.storage.key}",
        )
    start, length = record
    itemsize = ref.kind.numpy.itemsize
    entry = Entry(
        TensorInfo(name, ref.shape, ref.kind.name, path.name),
        start + ref.offset * itemsize,
        tuple(s * itemsize for s in ref.strides),
    )
    stored = ref.storage.count * ref.storage.kind.numpy.itemsize
    if stored > length or ref.offset * itemsize + entry.span > stored:
        raise BadInput(
            f"tensor {name!r}: it reaches beyond the bytes stored for it",
            where=str(path),
            expected=f"at least {max(stored, ref.offset * itemsize + entry.span)} bytes",
            found=min(length, stored),
        )
    return entry
