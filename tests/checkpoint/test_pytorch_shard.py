"""PyTorch files: what torch.save writes is read as torch reads it; anything else is refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch

from harness.checkpoint import Checkpoint
from harness.errors import BadInput

NAME = "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def refused(folder, *parts):
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(folder)
    for part in (NAME, *parts):
        assert part in str(caught.value)


def repack(path, change):
    """Rewrite the zip at `path`, `change(name, data)` giving a list of (name, data, method)."""
    beside = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(beside, "w") as new:
        for name in old.namelist():
            for name_, data, method in change(name, old.read(name)):
                new.writestr(name_, data, method)
    shutil.move(beside, path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_tensor(folder, tensor_bytes, protocol):
    wte = torch.randn(6, 4).to(torch.bfloat16)
    state = OrderedDict(
        wte=wte,
        head=wte,
        transposed=torch.randn(3, 5).t(),
        sliced=torch.randn(10, 4)[2:7, 1::2],
        broadcast=torch.tensor([1.5]).expand(4),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.randn(3)),
        wide=torch.tensor([2**40]),
        unsigned=torch.tensor([1, 65535], dtype=torch.uint16),
        eight=torch.randn(4).to(torch.float8_e4m3fn),
        flags=torch.tensor([True, False]),
    )
    state["name with ' \" \\ ☃ \n"] = torch.ones(1)
    torch.save(state, folder / NAME, pickle_protocol=protocol)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names == tuple(state)
    for info in checkpoint.tensors:
        assert f"torch.{info.dtype}" == str(state[info.name].dtype)
        assert info.shape == tuple(state[info.name].shape)
        assert checkpoint.read(info.name).tobytes() == tensor_bytes(state[info.name])
    assert checkpoint.aliases == (("wte", "head"),)


def test_a_modules_state_dict(folder):
    torch.save(torch.nn.Linear(2, 3).state_dict(), folder / NAME)  # carries _metadata
    assert Checkpoint.open(folder).names == ("weight", "bias")


class Payload:
    """Runs a shell command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_is_named_and_not_run(folder, protocol):
    witness = folder / "witness"
    state = {"a": torch.ones(1), "b": Payload(f"touch {witness}")}
    torch.save(state, folder / NAME, pickle_protocol=protocol)
    refused(folder, f"{os.system.__module__}.system", "nothing of the file was executed")
    assert not witness.exists()
    # The payload is real: Python's own unpickler runs it.
    pickle.loads(pickle.dumps(Payload(f"touch {witness}")))
    assert witness.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch witness'\ntR.",  # text protocol
        b"(S'touch witness'\nios\nsystem\n.",  # INST
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",  # a call without arguments
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",  # attributes of a global
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01tR.",
        b"\x80\x02ctorch\nload\n(K\x01tR.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02h\x05.",  # memo that was never set
        b"\x80\x02t.",  # no mark
        b"\x80\x02R.",  # empty stack
        b"\x80\x02}",  # no end
        b"\x80\x02}}.",  # two results
        b"\x80\x02(}Q.",  # persistent id that is no storage
        b"",
        b"\xff\xff",
        b"\x80\x02X\xff\xff\xff\x7f.",  # text longer than the file
    ],
)
def test_hostile_pickles(folder, program):
    torch.save({"a": torch.ones(1)}, folder / NAME)
    stored = zipfile.ZIP_STORED
    repack(
        folder / NAME,
        lambda name, data: [(name, program if name.endswith("data.pkl") else data, stored)],
    )
    refused(folder)


@pytest.mark.parametrize(
    ("state", "part"),
    [
        ({"a": torch.ones(1), "epoch": 3}, "'epoch'"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict'"),
        ({1: torch.ones(1)}, "entry 1"),
        ([torch.ones(1)], "type list"),
        (torch.ones(1), "a tensor"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(1, dtype=torch.complex64).conj()}, "conjugated"),
    ],
)
def test_files_that_hold_more_than_tensors(folder, state, part):
    torch.save(state, folder / NAME)
    refused(folder, part)


def test_a_whole_module(folder):
    torch.save(torch.nn.Linear(2, 2), folder / NAME)
    refused(folder, "torch.nn.modules.linear.Linear")


def test_the_format_before_1_6(folder):
    torch.save({"a": torch.ones(1)}, folder / NAME, _use_new_zipfile_serialization=False)
    refused(folder, "1.6", "weights_only=True")


def test_every_truncation_is_noticed(folder):
    torch.save({"a": torch.ones(3)}, folder / NAME)
    whole = (folder / NAME).read_bytes()
    for size in range(0, len(whole), 7):
        (folder / NAME).write_bytes(whole[:size])
        refused(folder)


def test_compressed_records(folder):
    torch.save({"a": torch.ones(99)}, folder / NAME)
    repack(folder / NAME, lambda name, data: [(name, data, zipfile.ZIP_DEFLATED)])
    refused(folder, "compressed")


def test_a_record_twice(folder):
    torch.save({"a": torch.ones(3)}, folder / NAME)
    stored = zipfile.ZIP_STORED
    with pytest.warns(UserWarning, match="Duplicate name"):
        repack(
            folder / NAME,
            lambda name, data: [(name, data, stored)] * (1 + name.endswith("data/0")),
        )
    refused(folder, "twice")


def test_a_record_too_short_for_its_tensor(folder):
    torch.save({"a": torch.ones(99)}, folder / NAME)
    stored = zipfile.ZIP_STORED
    repack(
        folder / NAME,
        lambda name, data: [(name, data[:-1] if name.endswith("data/0") else data, stored)],
    )
    refused(folder, "'a'", "beyond the bytes stored")


def test_a_record_that_is_missing(folder):
    torch.save({"a": torch.ones(9)}, folder / NAME)
    stored = zipfile.ZIP_STORED
    repack(
        folder / NAME,
        lambda name, data: [] if name.endswith("data/0") else [(name, data, stored)],
    )
    refused(folder, "'a'", "missing")


def test_big_endian(folder):
    torch.save({"a": torch.ones(9)}, folder / NAME)
    stored = zipfile.ZIP_STORED
    repack(
        folder / NAME,
        lambda name, data: [(name, b"big" if name.endswith("byteorder") else data, stored)],
    )
    refused(folder, "byte order")


def test_a_zip_that_is_no_checkpoint(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme", "hello")
    (folder / NAME).write_bytes(buffer.getvalue())
    refused(folder, "no PyTorch checkpoint")
