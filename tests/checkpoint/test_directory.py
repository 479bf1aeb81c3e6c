"""Directories, configurations and indexes that cannot be used, each refused in one sentence."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from harness.checkpoint import Checkpoint
from harness.errors import BadInput

ONE = {"a": torch.ones(2)}
TWO = {"a": torch.ones(2), "b": torch.zeros(3)}
INDEX = "model.safetensors.index.json"


def refused(path, *parts):
    """Opening `path` fails with one sentence that holds all `parts`."""
    before = sorted(os.listdir(path)) if path.is_dir() else None
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert before is None or sorted(os.listdir(path)) == before


def test_no_directory(tmp_path):
    refused(tmp_path / "absent", "absent", "does not exist")


def test_a_file_for_a_directory(write, tmp_path):
    write(tmp_path, ONE)
    refused(tmp_path / "model.safetensors", "not a directory")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "missing"),
        ("", "empty"),
        ("{", "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"attn_config": {"alibi": true, "alibi": false}}', "'alibi' appears twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
)
def test_config(write, tmp_path, text, part):
    write(tmp_path, ONE)
    config = tmp_path / "config.json"
    if text is None:
        config.unlink()
    elif isinstance(text, bytes):
        config.write_bytes(text)
    else:
        config.write_text(text)
    refused(tmp_path, "config.json", part)


def test_config_that_is_a_directory(write, tmp_path):
    write(tmp_path, ONE)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json", "not a regular file")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_text("no weights")
    refused(tmp_path, "holds no weights")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_empty_weights(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, name, "empty")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("special", ["directory", "fifo", "dangling link"])
def test_weights_that_are_no_file(tmp_path, name, special):
    (tmp_path / "config.json").write_text("{}")
    if special == "directory":
        (tmp_path / name).mkdir()
    elif special == "fifo":
        os.mkfifo(tmp_path / name)  # opening this for reading would wait for ever
    else:
        (tmp_path / name).symlink_to("nowhere")
    refused(tmp_path, name)


def test_of_both_formats_safetensors_is_read_and_the_other_is_reported(write, tmp_path):
    write(tmp_path, {"a": torch.ones(2)}, kind="pytorch")
    write(tmp_path, {"a": torch.zeros(2)}, kind="safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.ignored_files == ("pytorch_model.bin",)
    assert checkpoint.tensors[0].file == "model.safetensors"
    assert len(checkpoint.tensors) == 1


def test_incomplete_series_without_index(write, tmp_path):
    write(tmp_path, TWO, shards=2, index=False)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refused(tmp_path, "shard 1 of 2 is missing")


def test_two_series_without_index(write, tmp_path):
    write(tmp_path, TWO, shards=2, index=False)
    write(tmp_path, TWO, shards=1, index=False)
    refused(tmp_path, "several series", "1 and 2")


def test_shard_beyond_the_series(write, tmp_path):
    write(tmp_path, TWO, shards=2, index=False)
    os.link(
        tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00003-of-00002.safetensors"
    )
    refused(tmp_path, "shard 3 of 2")


def test_index_naming_a_missing_file(write, tmp_path):
    write(tmp_path, TWO, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, INDEX, "'model-00002-of-00002.safetensors'")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "'a'"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
    ],
)
def test_malformed_index(write, tmp_path, text, part):
    write(tmp_path, TWO, shards=2)
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX, part)


@pytest.mark.parametrize(
    "escape",
    [
        "../x.safetensors",
        "/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "a\0.safetensors",
        ".safetensors",
        "x.bin",
        "..",
        "",
    ],
)
def test_index_leading_elsewhere(write, tmp_path, escape):
    inside = write(tmp_path / "inside", TWO, shards=2)
    for place in (tmp_path, inside / "sub"):
        write(place, ONE)
        os.rename(place / "model.safetensors", place / "x.safetensors")
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": escape}}))
    refused(inside, INDEX, "'a'", "plain file name")


def test_index_promising_a_tensor_that_the_shard_lacks(write, tmp_path):
    write(tmp_path, TWO, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.index_missing == ("ghost",)
    assert checkpoint.names == ("a", "b")


def test_shard_outside_the_index_is_read_as_duplicates_and_strangers(write, tmp_path):
    write(tmp_path, TWO, shards=2)
    stray = {"a": torch.full((2,), 7.0), "c": torch.zeros(1)}
    write(tmp_path, stray, shards=None)
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(t.name for t in checkpoint.tensors) == ["a", "a", "b", "c"]
    assert sorted(checkpoint.unindexed) == ["a", "c"]
    assert checkpoint.read("a").tolist() == [1, 1]  # the indexed one


def test_of_duplicates_in_indexed_shards_the_indexed_one_is_read(write, tmp_path):
    write(tmp_path, TWO, shards=2)  # the index has a in the first shard and b in the second
    both = {"a": torch.ones(2), "b": torch.full((3,), 7.0)}
    write(tmp_path / "other", both)
    os.rename(
        tmp_path / "other" / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert [t.name for t in checkpoint.tensors] == ["a", "b", "b"]
    assert checkpoint.read("b").tolist() == [0, 0, 0]
    assert checkpoint.unindexed == ("b",)


def test_duplicates_across_shards_are_all_listed(write, tmp_path):
    write(tmp_path, TWO, shards=2, index=False, kind="pytorch")
    torch.save({"a": torch.full((2,), 7.0)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert [t.name for t in checkpoint.tensors] == ["a", "a"]
    assert checkpoint.names == ("a",)
    assert [a.tolist() for _, a in checkpoint.arrays()] == [[1, 1], [7, 7]]


def test_unknown_name(write, tmp_path):
    write(tmp_path, ONE)
    with pytest.raises(BadInput, match=re.escape("'zz'")):
        Checkpoint.open(tmp_path).read("zz")
