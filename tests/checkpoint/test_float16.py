"""The conversion of whole checkpoints."""

from __future__ import annotations

import errno
import json
import os
import time

import numpy as np
import pytest
import torch

from harness.checkpoint import Checkpoint, float16, float16_partial, pipeline
from harness.checkpoint.float16 import ConversionRefused, convert, target_of
from harness.checkpoint.float16_partial import exclusively
from harness.errors import BadInput

CONFIG = (
    '{\n    "eps": 1e-05, "torch_dtype" :"bfloat16",\n "z": {"torch_dtype": "x"}, "a":"\\u2603"}'
)


@pytest.fixture
def weights():
    seed = torch.Generator().manual_seed(3)
    wte = (torch.randn(50, 8, generator=seed) * 0.02).to(torch.bfloat16)
    return {
        "wte": wte,
        "head": wte,
        "square": torch.randn(9, 9, generator=seed).t(),
        "half": torch.randn(5, generator=seed).half(),
        "ids": torch.arange(4),
        "none": torch.empty(0, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "double": torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64),
    }


@pytest.fixture
def source(write, tmp_path, weights):
    path = write(tmp_path / "mpt", weights, kind="pytorch", shards=2)
    (path / "config.json").write_text(CONFIG)
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("# read me")
    (path / "nested" / "deeper").mkdir(parents=True)
    (path / "nested" / "deeper" / "vocab.txt").write_text("a b")
    (path / "nested" / "old.safetensors").write_text("old")
    (path / ".git").mkdir()
    (path / ".git" / "object").write_text("as large as the weights")
    for name in (
        "model.h5",
        "m.GGUF",
        "flax.msgpack",
        "x.pt",
        "tf.index.json",
        "training_args.bin",
    ):
        (path / name).write_text("old")
    return path


def files(path):
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


SIDE = ["README.md", "nested/deeper/vocab.txt", "tokenizer.json"]


def expected_bits(tensor):
    return tensor.to(torch.float16).contiguous().view(torch.int16).numpy().tobytes()


def test_values_files_and_report(source, weights):
    report = convert(source)
    target = source.with_name("mpt-float16")
    assert report.target == target == target_of(source)
    assert files(target) == sorted([*SIDE, "config.json", "model.safetensors"])
    assert list(report.side_files) == SIDE
    assert sorted(os.listdir(source.parent)) == ["mpt", "mpt-float16"]
    converted = Checkpoint.open(target)
    assert sorted(converted.names) == sorted(weights)
    for name, tensor in weights.items():
        array = converted.read(name)
        assert array.shape == tuple(tensor.shape)
        if name == "ids":
            assert array.dtype == np.int64
            assert array.tolist() == [0, 1, 2, 3]
        elif name == "double":
            assert array.tolist() == [1 + 2.0**-10]  # torch rounds by way of float32
        else:
            assert array.dtype == np.float16
            assert array.tobytes() == expected_bits(tensor)
    assert report.elements == sum(t.numel() for t in weights.values())
    assert [t.name for t in report.tensors] == [t.name for t in Checkpoint.open(source).tensors]
    for tensor in report.tensors:
        kind = str(weights[tensor.name].dtype)
        assert (f"torch.{tensor.dtype}", tensor.elements) == (kind, weights[tensor.name].numel())
    square = next(t for t in report.affected if t.name == "square")
    changed = weights["square"].half().float() != weights["square"]
    assert square.counts.inexact == int(changed.sum())
    assert report.bytes_read == sum(t.nbytes for t in Checkpoint.open(source).tensors)
    assert report.bytes_written == (target / "model.safetensors").stat().st_size


def test_the_configuration_changes_in_its_dtype_only(source):
    convert(source)
    text = (source.with_name("mpt-float16") / "config.json").read_text()
    assert text == CONFIG.replace('"bfloat16"', '"float16"')


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"dtype": "bfloat16"}', '{"dtype": "float16"}'),
        (
            '{"dtype":"bfloat16","torch_dtype":null}\n',
            '{"dtype":"float16","torch_dtype":"float16"}\n',
        ),
        ('{"\\u0064type": "bfloat16"}', '{"\\u0064type": "float16"}'),
        ('\ufeff{"dtype": "bfloat16"}', '\ufeff{"dtype": "float16"}'),
        ('{"n": [1, {"dtype": 2}]}', '{"n": [1, {"dtype": 2}],\n  "torch_dtype": "float16"\n}\n'),
        ("{ }", '{\n  "torch_dtype": "float16"\n}\n'),
    ],
)
def test_spellings_of_the_dtype(write, tmp_path, before, after):
    source = write(tmp_path / "m", {"a": torch.ones(2)})
    (source / "config.json").write_text(before)
    convert(source)
    assert (tmp_path / "m-float16" / "config.json").read_text() == after


def test_weights_only(source):
    assert convert(source, weights_only=True).side_files == ()
    assert files(source.with_name("mpt-float16")) == ["config.json", "model.safetensors"]


def test_links_are_copied_as_what_they_lead_to(source, tmp_path):
    (tmp_path / "blob").mkdir()
    (tmp_path / "blob" / "text").write_text("there")
    (source / "link").symlink_to(tmp_path / "blob" / "text")
    (source / "folder").symlink_to(tmp_path / "blob")
    convert(source)
    target = source.with_name("mpt-float16")
    assert (target / "folder" / "text").read_text() == "there"
    assert not (target / "link").is_symlink()
    assert (target / "link").read_text() == "there"


@pytest.mark.parametrize("goal", ["nowhere", "."])
def test_links_that_cannot_be_copied(source, goal):
    (source / "link").symlink_to(goal)
    with pytest.raises(BadInput, match=r"link.*leads"):
        convert(source)
    assert not source.with_name("mpt-float16").exists()


def test_shards_and_index(source):
    report = convert(source, max_shard_bytes=300)
    assert len(report.shards) > 2
    converted = Checkpoint.open(report.target)
    assert {t.file for t in converted.tensors} == set(report.shards)
    assert converted.index_missing == converted.unindexed == ()
    single = convert(source, target=source.with_name("single"))
    assert converted.digest == Checkpoint.open(single.target).digest


def test_a_folder_named_by_a_dot(source, monkeypatch):
    monkeypatch.chdir(source)
    assert convert(".").target == source.with_name("mpt-float16")


def test_an_existing_target_is_kept(source):
    target = source.with_name("mpt-float16")
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(BadInput, match=r"exists already.*--force"):
        convert(source)
    assert files(target) == ["mine"]
    assert sorted(os.listdir(source.parent)) == ["mpt", "mpt-float16"]
    convert(source, force=True)
    assert "mine" not in files(target)
    assert sorted(os.listdir(source.parent)) == ["mpt", "mpt-float16"]


def test_a_target_within_the_source(source):
    with pytest.raises(BadInput, match="within the source"):
        convert(source, target=source / "half")


def test_the_second_of_two_runs_says_so(source):
    with (
        exclusively(source.with_name("mpt-float16")),
        pytest.raises(BadInput, match=f"another run \\(process {os.getpid()}\\)"),
    ):
        convert(source)
    convert(source)


def test_a_lock_whose_file_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    lock, real = tmp_path / "t.lock", float16_partial.fcntl.flock
    taken = []

    def flock(descriptor, how):
        real(descriptor, how)
        taken.append(descriptor)
        if len(taken) == 1:
            lock.unlink()  # as the run before us does at its end

    monkeypatch.setattr(float16_partial.fcntl, "flock", flock)
    with exclusively(tmp_path / "t"):
        assert len(taken) == 2
        assert lock.exists()


def test_a_lock_left_by_a_killed_run_does_not_matter(source):
    source.with_name("mpt-float16.lock").write_text("12345")
    convert(source)
    assert sorted(os.listdir(source.parent)) == ["mpt", "mpt-float16"]


@pytest.mark.parametrize("value", [65536.0, float("inf"), float("nan")])
def test_overflow_is_refused_and_can_be_allowed(write, tmp_path, value):
    bad = torch.tensor([1.0, -value, 2.0**-30, 0.0], dtype=torch.bfloat16)
    source = write(tmp_path / "m", {"fine": torch.ones(3), "bad": bad})
    target = tmp_path / "m-float16"
    with pytest.raises(ConversionRefused, match=r"'bad'.*--allow-overflow") as caught:
        convert(source)
    assert caught.value.exit_code == 2
    counts = caught.value.report.affected[0].counts
    assert (counts.overflowed, counts.not_finite, counts.flushed) == (
        int(value == 65536.0),
        int(value != 65536.0),
        1,
    )
    assert not target.exists()
    report = convert(source, allow_overflow=True)
    assert report.kept_shards == report.shards
    assert report.totals == counts
    array = Checkpoint.open(target).read("bad")
    assert not np.isfinite(array[1])


def test_65280_is_the_largest_bfloat16_that_fits(write, tmp_path):
    source = write(tmp_path / "m", {"a": torch.tensor([65280.0, -65280.0]).to(torch.bfloat16)})
    assert not convert(source).totals


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_types_that_are_no_plain_floats(write, tmp_path, dtype):
    source = write(tmp_path / "m", {"a": torch.ones(2).to(dtype)})
    with pytest.raises(BadInput, match="'a' is stored as"):
        convert(source)
    assert os.listdir(tmp_path) == ["m"]


def test_duplicates_are_refused(write, tmp_path):
    source = write(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    write(source, {"a": torch.ones(2)})
    with pytest.raises(BadInput, match="'a' is there more than once"):
        convert(source)


def test_tensors_that_only_the_index_knows_are_refused(write, tmp_path):
    source = write(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    index = source / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["ghost"] = raw["weight_map"]["a"]
    index.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="'ghost'"):
        convert(source)


def test_no_tensor_at_all(write, tmp_path):
    source = write(tmp_path / "m", {}, kind="pytorch")
    with pytest.raises(BadInput, match="no tensor"):
        convert(source)


def test_too_little_space_is_said_beforehand(source, monkeypatch):
    usage = float16.shutil.disk_usage(source)
    monkeypatch.setattr(float16.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(BadInput, match=r"too little space left.*found 100"):
        convert(source)
    assert os.listdir(source.parent) == ["mpt"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fills_up(source, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline.os, call, full)
    with pytest.raises(BadInput, match="No space left on device"):
        convert(source)
    monkeypatch.undo()
    assert not source.with_name("mpt-float16").exists()
    assert not source.with_name("mpt-float16.partial").exists()
    convert(source)


def test_a_target_in_no_directory(source, tmp_path):
    with pytest.raises(BadInput, match="No such file or directory"):
        convert(source, target=tmp_path / "absent" / "half")


def test_a_file_in_place_of_the_work(source):
    source.with_name("mpt-float16.partial").write_text("mine")
    with pytest.raises(BadInput, match="File exists"):
        convert(source)
    assert source.with_name("mpt-float16.partial").read_text() == "mine"


def test_progress_reaches_the_whole(source):
    seen = []
    convert(source, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in Checkpoint.open(source).tensors)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_buffers_are_not_reused_before_they_are_written(write, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_CHUNK", 64)
    real = os.write

    def slow(descriptor, data):
        time.sleep(0.001)
        return real(descriptor, data[:50])  # and short, as a write may be

    monkeypatch.setattr(pipeline.os, "write", slow)
    tensor = torch.randn(64 * 20 + 5)
    source = write(tmp_path / "m", {"a": tensor})
    convert(source)
    assert Checkpoint.open(tmp_path / "m-float16").read("a").tobytes() == expected_bits(tensor)
