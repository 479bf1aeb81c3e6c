"""Safetensors files that lie about themselves."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from harness.checkpoint import Checkpoint
from harness.errors import BadInput


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path, *parts):
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(path)
    for part in ("model.safetensors", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("header", "size", "part"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "'a' and 'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlaps"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "2 bytes before tensor 'b'"),
        ({"a": entry(0, 4)}, 7, "3 bytes at the end"),
        ({"a": entry(0, 4)}, 3, "truncated"),
        ({"a": entry(0, 8)}, 8, "do not fit"),
        ({"a": entry(4, 0)}, 4, "data_offsets"),
        ({"a": entry(-4, 0)}, 4, "data_offsets"),
        ({"a": entry(0, 4, (-1,))}, 4, "shape"),
        ({"a": entry(0, 4, (True,))}, 4, "shape"),
        ({"a": entry(0, 4, (1.0,))}, 4, "shape"),
        ({"a": entry(0, 4, (2**62, 2**62))}, 4, "do not fit"),
        ({"a": entry(0, 4, dtype="F33")}, 4, "unknown dtype"),
        ({"a": entry(0, 4, dtype=None)}, 4, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "malformed header entry"),
        ({"a": 3}, 4, "malformed header entry"),
        ([], 0, "not a JSON object"),
    ],
)
def test_lying_header(raw_safetensors, tmp_path, header, size, part):
    refused(raw_safetensors(tmp_path, json.dumps(header), bytes(size)), part)


@pytest.mark.parametrize("text", ["{", "", b"\xff\xfe", "[" * 100_000, '{"a": }'])
def test_header_that_is_no_json(raw_safetensors, tmp_path, text):
    refused(raw_safetensors(tmp_path, text, b""), "not valid JSON")


@pytest.mark.parametrize("length", [9, 2**20, 100_000_001, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path, length):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}      ")
    refused(tmp_path, "header is longer", str(length))


def test_header_longer_than_the_format_allows(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    refused(tmp_path, "header is longer")


def test_every_truncation_is_noticed(write, tmp_path):
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(2).half()})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refused(tmp_path)


def test_a_key_twice_is_two_entries(raw_safetensors, tmp_path):
    one, two = json.dumps(entry(0, 4)), json.dumps(entry(4, 8))
    data = struct.pack("<ff", 1.0, 2.0)
    raw_safetensors(tmp_path, f'{{"a": {one}, "a": {two}}}', data)
    checkpoint = Checkpoint.open(tmp_path)
    assert [t.name for t in checkpoint.tensors] == ["a", "a"]
    assert [a.tolist() for _, a in checkpoint.arrays()] == [[1.0], [2.0]]


def test_a_key_twice_with_the_same_bytes_is_two_entries(raw_safetensors, tmp_path):
    one = json.dumps(entry(0, 4))
    raw_safetensors(tmp_path, f'{{"a": {one}, "a": {one}}}', bytes(4))
    assert len(Checkpoint.open(tmp_path).tensors) == 2


def test_a_field_twice_is_malformed(raw_safetensors, tmp_path):
    text = '{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'
    refused(raw_safetensors(tmp_path, text, bytes(4)), "malformed header entry")


def test_unaligned_data_is_read(raw_safetensors, tmp_path):
    header = {"a": entry(0, 1, dtype="U8"), "b": entry(1, 5)}
    raw_safetensors(tmp_path, json.dumps(header), b"\x07" + struct.pack("<f", 1.5))
    assert Checkpoint.open(tmp_path).read("b").tolist() == [1.5]


def test_integers_and_float8_stay_what_they_are(write, tmp_path):
    write(tmp_path, {"i": torch.tensor([2**60]), "f": torch.tensor([0.5]).to(torch.float8_e5m2)})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("i").dtype == "int64"
    assert checkpoint.read("i").tolist() == [2**60]
    assert {t.name: t.dtype for t in checkpoint.tensors} == {"i": "int64", "f": "float8_e5m2"}
    assert checkpoint.read("f").dtype.name == "float8_e5m2"
