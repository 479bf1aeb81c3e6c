"""Writing tensors as a model hub lays a checkpoint out: config.json, shards, and their index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Format = Literal["bin", "safetensors"]

STORAGE: Mapping[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STEM = {"bin": "pytorch_model", "safetensors": "model"}


def write_checkpoint(
    directory: Path,
    config_raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Array],
    *,
    dtype: str,
    shards: int = 2,
    fmt: Format = "bin",
) -> Path:
    """Write config.json and the tensors; one shard's tensors are in memory at a time.

    Parameters
    ----------
    directory
        Made if it is not there; files of the same names are replaced.
    config_raw
        What becomes config.json, with `torch_dtype` set to `dtype`.
    shapes
        Name to shape of the tensors, in the order in which they are written.
    read
        Gives the values of one tensor, of any float type.
    dtype
        Storage type: a key of `STORAGE`. Values are rounded to nearest even.
    shards
        How many files; 1 writes a single file without an index.
    fmt
        ``"bin"`` (torch.save) or ``"safetensors"``.

    Raises
    ------
    ValueError
        Unknown dtype or format, fewer tensors than shards, or a value of another shape than told.
    """
    if dtype not in STORAGE:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(STORAGE)}")
    if fmt not in _STEM:
        raise ValueError(f"fmt {fmt!r}: expected one of {', '.join(_STEM)}")
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(config_raw) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    groups = _split(shapes, shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = _STEM[fmt] + (f"-{number:05}-of-{shards:05}" if shards > 1 else "") + f".{fmt}"
        arrays = {name: _stored(name, read(name), shapes[name], dtype) for name in names}
        _save(directory / file, arrays, fmt)
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * STORAGE[dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{_STEM[fmt]}.{fmt}.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )
    return directory


def _split(shapes: Mapping[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Consecutive groups of about equal size, none of them empty."""
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"shards {shards}: expected 1 to {len(shapes)}, the number of tensors")
    total, seen = sum(math.prod(shape) for shape in shapes.values()), 0
    groups: list[list[str]] = [[]]
    for left, (name, shape) in zip(range(len(shapes), 0, -1), shapes.items(), strict=True):
        wanted = shards - len(groups)
        full = seen >= total * len(groups) / shards
        if groups[-1] and wanted and (full or left <= wanted):
            groups.append([])
        groups[-1].append(name)
        seen += math.prod(shape)
    return groups


def _stored(name: str, value: Array, shape: tuple[int, ...], dtype: str) -> Array:
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {value.shape}")
    return np.ascontiguousarray(value.astype(STORAGE[dtype]))


def _save(file: Path, arrays: Mapping[str, Array], fmt: Format) -> None:
    # Both libraries are slow to import, and reading cases needs neither.
    if fmt == "safetensors":
        from safetensors.numpy import save_file

        save_file(dict(arrays), file, metadata={"format": "pt"})
    else:
        from cases.scripts import pickled_shard

        pickled_shard.save(file, arrays)
