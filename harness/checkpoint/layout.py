"""Which files of a directory are the checkpoint's weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.entry import reading
from harness.checkpoint.strict_json import read_object
from harness.errors import BadInput


@dataclass(frozen=True)
class Layout:
    """The weight files of a directory.

    Attributes
    ----------
    format
        ``"safetensors"`` or ``"pytorch"``.
    files
        Names of all shards on disk, those the index does not name included, in order.
    weight_map
        The index's tensor name to shard name, or None where there is no index.
    unindexed_files
        Those of `files` that the index does not name.
    ignored
        Weight files of the other format, which are not read.
    """

    format: str
    files: tuple[str, ...]
    weight_map: dict[str, str] | None
    unindexed_files: tuple[str, ...]
    ignored: tuple[str, ...]


_STEMS = {"safetensors": ("model", ".safetensors"), "pytorch": ("pytorch_model", ".bin")}


def _names(directory: Path, kind: str) -> tuple[str, ...]:
    stem, suffix = _STEMS[kind]
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?" + re.escape(suffix))
    return tuple(sorted(n for n in os.listdir(directory) if pattern.fullmatch(n)))


def index_name(kind: str) -> str:
    """File name of the index of a format."""
    return "".join(_STEMS[kind]) + ".index.json"


def find_layout(directory: Path) -> Layout:
    """Find the weight files of `directory`.

    Where both formats are present safetensors is read and the other is listed in ``ignored``, as
    transformers does: published repositories carry both.

    Raises
    ------
    BadInput
        No weights; an index that is malformed, leads out of the directory or names a file that is
        not there; a set of numbered shards without an index that is not complete.
    """
    with reading(directory):
        found = {kind: _names(directory, kind) for kind in _STEMS}
        indexed = {kind: os.path.lexists(directory / index_name(kind)) for kind in _STEMS}
    for kind in _STEMS:
        if found[kind] or indexed[kind]:
            break
    else:
        raise BadInput(
            "the directory holds no weights",
            where=str(directory),
            expected="model.safetensors, pytorch_model.bin, or their numbered shards",
        )
    ignored = () if kind == "pytorch" else found["pytorch"]
    if not indexed[kind]:
        _check_complete(directory, found[kind])
        return Layout(kind, found[kind], None, (), ignored)
    weight_map = _read_weight_map(directory, kind)
    named = tuple(sorted(set(weight_map.values())))
    for name in named:
        if not (directory / name).is_file():
            raise BadInput(
                f"the index names the shard {name!r}, which is not a file in the directory",
                where=str(directory / index_name(kind)),
                hint="fetch the missing shard or remove the index",
            )
    extra = tuple(n for n in found[kind] if n not in set(named))
    return Layout(kind, named + extra, weight_map, extra, ignored)


def _check_complete(directory: Path, names: tuple[str, ...]) -> None:
    """Numbered shards without an index must be one whole series."""
    numbered = [(n, re.search(r"-(\d{5})-of-(\d{5})\.", n)) for n in names]
    series = [(int(m[1]), int(m[2])) for _, m in numbered if m]
    totals = sorted({total for _, total in series})
    if len(totals) > 1:
        raise BadInput(
            "numbered shards of several series lie side by side without an index",
            where=str(directory),
            expected="one series",
            found="series of " + " and ".join(map(str, totals)),
        )
    for total in totals:
        present = [number for number, _ in series]
        missing = next((n for n in range(1, total + 1) if n not in present), None)
        if missing is not None or len(present) != total:
            raise BadInput(
                f"shard {missing or max(present)} of {total} is "
                + ("missing" if missing else "more than the series has"),
                where=str(directory),
                expected=f"shards 1 to {total}",
                found=", ".join(n for n, m in numbered if m),
            )


def _read_weight_map(directory: Path, kind: str) -> dict[str, str]:
    path = directory / index_name(kind)
    raw = read_object(path).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise BadInput(
            "the index has no usable 'weight_map'",
            where=str(path),
            expected="an object from tensor name to shard name",
            found="nothing" if raw is None else repr(raw)[:80],
        )
    suffix = _STEMS[kind][1]
    for tensor, file in raw.items():
        plain = isinstance(file, str) and not re.search(r"[/\\\x00]", file)
        if not plain or not file.endswith(suffix) or file == suffix:
            raise BadInput(
                f"the weight_map sends {tensor!r} to something that is no shard of this directory",
                where=str(path),
                expected=f"a plain file name ending in {suffix}",
                found=repr(file),
            )
    return dict(raw)
