"""What is written in any Hugging Face layout is read back to the bit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint import Checkpoint, TensorInfo
from harness.errors import BadInput

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
LAYOUTS = [
    (kind, shards, index)
    for kind in ("safetensors", "pytorch")
    for shards, index in ((None, False), (1, True), (3, True), (3, False))
]


@st.composite
def tensors(draw):
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    made = {}
    for name in draw(
        st.lists(names.filter(lambda n: n != "__metadata__"), min_size=1, unique=True)
    ):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        if dtype == "bool":
            made[name] = torch.randint(0, 2, shape, generator=seed).to(torch.bool)
        else:
            width = torch.empty((), dtype=DTYPES[dtype]).element_size()
            raw = torch.randint(0, 256, [*shape, width], generator=seed, dtype=torch.uint8)
            made[name] = raw.view(DTYPES[dtype])[..., 0]
    return made


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(LAYOUTS))
def test_round_trip(write, tensor_bytes, expected, layout):
    kind, shards, index = layout
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), expected, kind=kind, shards=shards, index=index)
        checkpoint = Checkpoint.open(directory)
        assert sorted(checkpoint.names) == sorted(expected)
        assert len(checkpoint.tensors) == len(expected)
        assert checkpoint.index_missing == checkpoint.unindexed == ()
        for info in checkpoint.tensors:
            tensor = expected[info.name]
            assert (info.shape, DTYPES[info.dtype]) == (tuple(tensor.shape), tensor.dtype)
            array = checkpoint.read(info.name)
            assert array.shape == info.shape
            assert not array.flags.writeable
            assert array.tobytes() == tensor_bytes(tensor)


@settings(max_examples=15, deadline=None)
@given(tensors())
def test_the_digest_knows_no_layout(write, expected):
    digests = set()
    for kind, shards, index in LAYOUTS:
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), expected, kind=kind, shards=shards, index=index)
            digests.add(Checkpoint.open(directory).digest)
    assert len(digests) == 1


def test_the_digest_knows_every_part(write, tmp_path):
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    variants = [
        (base, {}),
        (base, {"config": {"torch_dtype": "float16"}}),
        ({**base, "b": torch.tensor([3.0, 5.0])}, {}),
        ({"a": base["b"], "b": base["a"]}, {}),
        ({"a": base["a"], "c": base["b"]}, {}),
        ({**base, "b": base["b"].reshape(2, 1)}, {}),
        ({**base, "b": base["b"].view(torch.int32)}, {}),
        ({"a": base["a"]}, {}),
    ]
    paths = [write(tmp_path / str(i), t, **o) for i, (t, o) in enumerate(variants)]
    assert len({Checkpoint.open(p).digest for p in paths}) == len(variants)


def test_a_changed_file_has_another_digest_and_cannot_be_read_on(write, tmp_path):
    write(tmp_path, {"a": torch.zeros(4)})
    before = Checkpoint.open(tmp_path)
    digest = before.digest
    write(tmp_path, {"a": torch.zeros(5)})
    with pytest.raises(BadInput, match="changed while it was being read"):
        before.read("a")
    assert Checkpoint.open(tmp_path).digest != digest


def test_bfloat16_is_a_view_of_the_file(write, tmp_path):
    write(tmp_path, {"a": torch.randn(8, 8).to(torch.bfloat16)})
    array = Checkpoint.open(tmp_path).read("a")
    assert array.dtype == ml_dtypes.bfloat16
    assert not array.flags.owndata


def test_storage_dtype_is_that_of_most_elements(write, tmp_path):
    write(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(2).half(), "c": torch.zeros(2).half()})
    assert Checkpoint.open(tmp_path).storage_dtype == "float16"


def test_linked_files_are_followed(write, tmp_path):
    blobs = write(tmp_path / "blobs", {"a": torch.ones(2)})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../blobs/{path.name}")
    assert np.array_equal(Checkpoint.open(snapshot).read("a"), [1, 1])


def test_tensor_info_is_what_the_contract_says(write, tmp_path):
    write(tmp_path, {"a": torch.ones(2, 3)})
    assert Checkpoint.open(tmp_path).tensors == (
        TensorInfo("a", (2, 3), "float32", "model.safetensors"),
    )


def test_importing_the_reader_imports_no_framework():
    code = (
        "import sys, harness.checkpoint, harness.checkpoint.float16\n"
        "heavy = {'torch', 'safetensors', 'transformers', 'rich', 'tvm'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
