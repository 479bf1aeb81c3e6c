"""Shards as the safetensors library reads them."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from harness.checkpoint import Checkpoint, TensorInfo
from harness.checkpoint.writer import plan_shards, write_safetensors_shards
from harness.errors import BadInput

ARRAYS = {
    "odd": np.arange(3, dtype=np.uint8),
    "w": np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "☃": np.arange(4, dtype=np.int64),
    "none": np.empty((0, 5), np.float16),
    "scalar": np.array(1.5, np.float32),
}
INFOS = tuple(TensorInfo(n, a.shape, a.dtype.name, "") for n, a in ARRAYS.items())


@pytest.mark.parametrize("limit", [1, 24, 30, 32, 10**9])
def test_round_trip(tmp_path, limit):
    calls = []

    def read(name):
        calls.append(name)
        return ARRAYS[name]

    shards = write_safetensors_shards(tmp_path, INFOS, read, max_shard_bytes=limit)
    assert sorted(calls) == sorted(ARRAYS)
    for shard in shards:
        sizes = [t.nbytes for t in shard.tensors]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        with safe_open(tmp_path / shard.file, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(t.name for t in shard.tensors)
            for tensor in shard.tensors:
                loaded = file.get_tensor(tensor.name)
                assert str(loaded.dtype) == f"torch.{tensor.dtype}"
                array = ARRAYS[tensor.name]
                assert tuple(loaded.shape) == array.shape
                assert loaded.tolist() == array.astype(np.float64).tolist()
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert {n: checkpoint.read(n).tobytes() for n in checkpoint.names} == {
        n: a.tobytes() for n, a in ARRAYS.items()
    }


def test_index(tmp_path):
    write_safetensors_shards(tmp_path, INFOS, ARRAYS.__getitem__, max_shard_bytes=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    assert list(index["weight_map"]) == list(ARRAYS)
    assert len(set(index["weight_map"].values())) == len(ARRAYS)  # one byte a shard


def test_every_tensor_is_aligned(tmp_path):
    (shard,) = plan_shards(INFOS, 10**9)
    assert len(shard.header) % 8 == 0
    position = len(shard.header)
    for tensor in shard.tensors:
        assert position % ARRAYS[tensor.name].dtype.itemsize == 0
        position += tensor.nbytes


def test_not_contiguous(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    info = TensorInfo("a", (3, 2), "float32", "")
    write_safetensors_shards(tmp_path, [info], lambda _: array, max_shard_bytes=100)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("a"), array)


@pytest.mark.parametrize(
    ("infos", "limit", "part"),
    [
        (INFOS, 0, "max_shard_bytes"),
        ((INFOS[0], INFOS[0]), 9, "'odd' is taken"),
        ((TensorInfo("__metadata__", (), "float32", ""),), 9, "'__metadata__' is taken"),
        ((TensorInfo("\ud800", (), "float32", ""),), 9, "not valid Unicode"),
    ],
)
def test_refused_plans(infos, limit, part):
    with pytest.raises(BadInput, match=re.escape(part)):
        plan_shards(infos, limit)


@pytest.mark.parametrize("array", [np.zeros(3, np.float64), np.zeros((3, 1), np.float32)])
def test_another_array_than_announced(tmp_path, array):
    info = TensorInfo("a", (3,), "float32", "")
    with pytest.raises(BadInput, match="'a' is not what was announced"):
        write_safetensors_shards(tmp_path, [info], lambda _: array, max_shard_bytes=100)
