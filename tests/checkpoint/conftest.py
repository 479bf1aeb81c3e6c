"""Checkpoints made by the formats' own libraries, so that the reader is not its own witness."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Tensors = Mapping[str, torch.Tensor]


def _write(
    directory: Path,
    tensors: Tensors,
    *,
    kind: str = "safetensors",
    shards: int | None = None,
    index: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; `shards` None is the single-file layout."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"torch_dtype": "bfloat16"} if config is None else config)
    (directory / "config.json").write_text(text)
    stem, suffix = {"safetensors": ("model", ".safetensors"), "pytorch": ("pytorch_model", ".bin")}[
        kind
    ]
    names = list(tensors)
    if shards is None:
        files = {f"{stem}{suffix}": names}
    else:
        files = {
            f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}": names[i::shards] for i in range(shards)
        }
        if index:
            where = {name: file for file, held in files.items() for name in held}
            (directory / f"{stem}{suffix}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": where})
            )
    for file, held in files.items():
        part = {name: tensors[name] for name in held}
        if kind == "pytorch":
            torch.save(part, directory / file)
        else:
            dense = {n: t.detach().clone().contiguous() for n, t in part.items()}
            save_file(dense, directory / file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return _write


@pytest.fixture(scope="session")
def raw_safetensors() -> Callable[[Path, str | bytes, bytes], Path]:
    """Write a safetensors file of a header given literally, and its configuration."""

    def make(directory: Path, header: str | bytes, data: bytes) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text("{}")
        text = header.encode() if isinstance(header, str) else header
        file = struct.pack("<Q", len(text)) + text + data
        (directory / "model.safetensors").write_bytes(file)
        return directory

    return make


@pytest.fixture(scope="session")
def tensor_bytes() -> Callable[[torch.Tensor], bytes]:
    """The bytes of a tensor's elements in row-major order, as torch sees them."""

    def give(tensor: torch.Tensor) -> bytes:
        dense = tensor.detach().contiguous().reshape(-1)
        return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""

    return give
