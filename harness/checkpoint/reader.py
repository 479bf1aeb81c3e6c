"""One reader for the Hugging Face layouts, a tensor at a time.

It knows no model: names, shapes and bytes only.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import BY_NAME
from harness.checkpoint.entry import Entry, FileStamp, TensorInfo, reading
from harness.checkpoint.layout import Layout, find_layout
from harness.checkpoint.pytorch_shard import list_pytorch
from harness.checkpoint.safetensors_shard import list_safetensors
from harness.checkpoint.strict_json import read_object
from harness.errors import BadInput

_LISTERS = {"safetensors": list_safetensors, "pytorch": list_pytorch}
_HASH_STEP = 2**24
_digests: dict[tuple[str, tuple[FileStamp, ...], str], str] = {}


class Checkpoint:
    """The configuration and tensors of a checkpoint directory, none of the tensors in memory.

    Made by `Checkpoint.open`.

    Attributes
    ----------
    path : Path
        The directory.
    config : dict
        ``config.json`` as it was parsed.
    tensors : tuple of TensorInfo
        Every entry of every shard, in file order; a name that is there twice is listed twice.
    index_missing : tuple of str
        Names that the index places in a shard that lacks them.
    unindexed : tuple of str
        Names of entries that the index does not place where they are.
    ignored_files : tuple of str
        Weight files in another format beside the ones read.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        layout: Layout,
        entries: tuple[Entry, ...],
        stamps: dict[str, FileStamp],
    ) -> None:
        self.path = path
        self.config = config
        self.layout = layout
        self.entries = entries
        self.tensors: tuple[TensorInfo, ...] = tuple(e.info for e in entries)
        self.ignored_files = layout.ignored
        self._stamps = stamps
        self._by_name: dict[str, Entry] = {}
        weight_map = layout.weight_map or {}
        for entry in entries:
            # Of several entries under a name the indexed one is read, else the first.
            indexed = weight_map.get(entry.info.name) == entry.info.file
            if indexed and self._by_name.get(entry.info.name, entry).info.file != entry.info.file:
                self._by_name[entry.info.name] = entry
            self._by_name.setdefault(entry.info.name, entry)
        present = {(t.name, t.file) for t in self.tensors}
        self.index_missing = tuple(n for n, f in weight_map.items() if (n, f) not in present)
        self.unindexed: tuple[str, ...] = ()
        if layout.weight_map is not None:
            self.unindexed = tuple(t.name for t in self.tensors if weight_map.get(t.name) != t.file)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """List the checkpoint in the directory `path`, reading no weights.

        Raises
        ------
        BadInput
            One sentence that names the file, and the field or tensor, that cannot be used.
        """
        path = Path(path)
        with reading(path):
            if not path.exists():
                raise BadInput("the directory does not exist", where=str(path))
            if not path.is_dir():
                raise BadInput(
                    "not a directory", where=str(path), hint="name the directory that holds it"
                )
        config = read_object(path / "config.json")
        layout = find_layout(path)
        entries: list[Entry] = []
        stamps: dict[str, FileStamp] = {}
        for name in layout.files:
            with reading(path / name):
                if not (path / name).is_file():
                    raise BadInput("not a regular file", where=str(path / name))
                stamps[name] = FileStamp.of(path / name)
            entries.extend(_LISTERS[layout.format](path / name))
        return cls(path, config, layout, tuple(entries), stamps)

    @property
    def names(self) -> tuple[str, ...]:
        """Every distinct tensor name, in file order."""
        return tuple(self._by_name)

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Map the tensor `name` into memory.

        Returns
        -------
        numpy.ndarray
            A read-only view of the file in the stored dtype (bfloat16 as ml_dtypes.bfloat16; an
            integer stays an integer). The mapping covers this tensor alone and ends with the array.

        Raises
        ------
        BadInput
            There is no such tensor, or its file changed since the checkpoint was opened.
        """
        entry = self._by_name.get(name)
        if entry is None:
            raise BadInput(f"no tensor is named {name!r}", where=str(self.path))
        return self.read_entry(entry)

    def read_entry(self, entry: Entry) -> np.ndarray[Any, np.dtype[Any]]:
        """Map one entry of `entries`; reaches the duplicates that `read` does not."""
        info, path = entry.info, self.path / entry.info.file
        dtype = BY_NAME[info.dtype].numpy
        if info.size == 0:
            empty = np.empty(info.shape, dtype)
            empty.flags.writeable = False
            return empty
        start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
        with reading(path), path.open("rb") as file:
            if FileStamp.of(file.fileno()) != self._stamps[info.file]:
                raise BadInput("the file changed while it was being read", where=str(path))
            length = entry.offset + entry.span - start
            mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        return np.ndarray(info.shape, dtype, mapping, entry.offset - start, entry.strides)

    def arrays(self) -> Iterator[tuple[TensorInfo, np.ndarray[Any, np.dtype[Any]]]]:
        """Every entry, duplicates included, with its array, in file order."""
        for entry in self.entries:
            yield entry.info, self.read_entry(entry)

    @cached_property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that are one and the same tensor in a file (tied weights)."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for entry in self.entries:
            if entry.info.size:
                place = (entry.info.file, entry.offset, entry.info.shape, entry.strides)
                groups.setdefault(place, []).append(entry.info.name)
        distinct = (tuple(dict.fromkeys(names)) for names in groups.values())
        return tuple(names for names in distinct if len(names) > 1)

    @cached_property
    def storage_dtype(self) -> str:
        """The dtype that most elements are stored in; "none" for a checkpoint without elements."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.size
        return sizes.most_common(1)[0][0] if sizes else "none"

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 of the configuration's values, whatever its formatting and key order."""
        canonical = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 over the configuration and every entry's name, dtype, shape and elements.

        It does not depend on format, sharding or order: the same tensors give the same digest.
        Computed once in a process for as long as the files stay the same.
        """
        key = (str(self.path.resolve()), tuple(self._stamps.values()), self.config_digest)
        if key not in _digests:
            _digests[key] = self._compute_digest()
        return _digests[key]

    def _compute_digest(self) -> str:
        total = hashlib.sha256(self.config_digest.encode())
        for entry in sorted(self.entries, key=lambda e: e.info.name):
            info = entry.info
            # Each part is hashed apart so that no name can imitate another's bytes.
            head = json.dumps([info.name, info.dtype, list(info.shape)]).encode()
            total.update(hashlib.sha256(head).digest())
            content = hashlib.sha256()
            raw: Any = np.ascontiguousarray(self.read_entry(entry)).reshape(-1).view(np.uint8)
            for start in range(0, raw.size, _HASH_STEP):
                content.update(raw[start : start + _HASH_STEP])
            total.update(content.digest())
        return total.hexdigest()
