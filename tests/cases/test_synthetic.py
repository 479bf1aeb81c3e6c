"""Seeded checkpoints: layout, determinism, and the traps they are made to avoid."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases.exposure import small_config
from cases.hub_layout import STORAGE, write_checkpoint
from cases.strategies import configs
from cases.synthetic import ScaleProfile, make_checkpoint, random_tensor
from cases.topology import tensor_shapes
from harness.checkpoint import Checkpoint
from reference.config import MPTConfig
from reference.topology import topology as reference_topology
from relax_impl.config import MPTConfig as PortConfig
from relax_impl.topology import topology as port_topology


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_what_is_written_is_what_was_drawn(
    tmp_path: Path, fmt: Any, dtype: str, shards: int
) -> None:
    raw = small_config(no_bias=False)
    make_checkpoint(tmp_path, raw, seed=3, dtype=dtype, shards=shards, fmt=fmt)
    checkpoint = Checkpoint.open(tmp_path)
    shapes = tensor_shapes(raw)
    assert sorted(checkpoint.names) == sorted(shapes)
    assert len({info.file for info in checkpoint.tensors}) == shards
    for name, shape in shapes.items():
        drawn = random_tensor(name, shape, 3).astype(STORAGE[dtype])
        assert checkpoint.read(name).dtype == STORAGE[dtype]
        assert checkpoint.read(name).tobytes() == drawn.tobytes()
    assert json.loads((tmp_path / "config.json").read_text()) == raw | {"torch_dtype": dtype}


@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
def test_bit_equal_twice(tmp_path: Path, fmt: Any) -> None:
    for folder in ("a", "b"):
        make_checkpoint(tmp_path / folder, small_config(), seed=1, dtype="bfloat16", fmt=fmt)
    make_checkpoint(tmp_path / "c", small_config(), seed=2, dtype="bfloat16", fmt=fmt)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_shards_are_consecutive_and_indexed(tmp_path: Path) -> None:
    raw = small_config()
    make_checkpoint(tmp_path, raw, seed=1, dtype="float16", shards=3)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    shapes = tensor_shapes(raw)
    assert list(index["weight_map"]) == list(shapes)
    assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 2 * sum(map(math.prod, shapes.values()))
    for number in (1, 2, 3):
        file = f"pytorch_model-0000{number}-of-00003.bin"
        names = [name for name, place in index["weight_map"].items() if place == file]
        assert list(torch.load(tmp_path / file, weights_only=True)) == names != []


@given(configs())
def test_every_room_works_out_the_same_table(raw: dict[str, Any]) -> None:
    table = list(tensor_shapes(raw).items())
    assert table == list(reference_topology(MPTConfig.from_dict(raw)).items())
    assert table == list(port_topology(PortConfig.from_dict(raw)).items())


def test_traps_are_not_set() -> None:
    profile = ScaleProfile()
    shapes = tensor_shapes(small_config(24, head_dim=32, no_bias=False))
    outliers: set[frozenset[int]] = set()
    for name, shape in shapes.items():
        value = random_tensor(name, shape, 5)
        kind = name.rsplit(".", 1)[1]
        assert value.dtype == np.float32 and value.shape == shape
        if kind == "bias":
            assert np.abs(value).max() > 0
        elif len(shape) == 1:
            scale = np.median(np.abs(value))
            flipped = np.mean(value < 0)
            assert 0 < flipped < 2.5 * profile.gamma_flips
            assert np.std(np.abs(value)) > 0.2 * scale
            assert np.sort(np.abs(value))[-1] > 2 * scale
        elif name.endswith("wte.weight"):
            # Within five standard errors of the profile's standard deviation.
            error = profile.embedding_std / math.sqrt(2 * value.size)
            assert abs(value.std() - profile.embedding_std) < 5 * error
        elif name.endswith(("out_proj.weight", "down_proj.weight")):
            rows = np.argsort(np.linalg.norm(value, axis=1))
            outliers.add(frozenset(rows[-profile.outlier_channels :].tolist()))
    assert len(outliers) == 1, "the stream's outlier channels are the same in every layer"


def test_values_depend_on_seed_and_name_alone() -> None:
    one = random_tensor("transformer.blocks.0.norm_1.weight", (40,), 1)
    assert (one == random_tensor("transformer.blocks.0.norm_1.weight", (40,), 1)).all()
    assert (one != random_tensor("transformer.blocks.0.norm_2.weight", (40,), 1)).any()
    assert (one != random_tensor("transformer.blocks.0.norm_1.weight", (40,), 2)).any()


@given(st.floats(width=32, allow_nan=False))
def test_rounding_is_to_nearest_even(value: float) -> None:
    """torch and ml_dtypes round alike, so that it does not matter which of them converts."""
    with np.errstate(over="ignore"):
        ours = np.float32(value).astype(ml_dtypes.bfloat16)
    assert float(ours) == float(torch.tensor(value, dtype=torch.float32).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"fmt": "gguf"}, "fmt 'gguf'"),
        ({"shards": 0}, "shards 0"),
        ({"shards": 2}, "shards 2: expected 1 to 1"),
        ({"shapes": {"a": (3,)}}, r"a: expected shape \(3,\), found \(2,\)"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"dtype": "float32", "shards": 1, "shapes": {"a": (2,)}} | changes
    with pytest.raises(ValueError, match=message):
        write_checkpoint(
            tmp_path,
            {},
            arguments.pop("shapes"),
            lambda name: np.zeros(2, np.float32),
            **arguments,
        )
