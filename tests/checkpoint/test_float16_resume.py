"""Conversions that are killed, taken up again, and measured from outside."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.checkpoint.float16 import convert

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from harness.checkpoint.float16 import convert

def progress(done, total):
    if done > float(sys.argv[2]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], max_shard_bytes=40_000, progress=progress)
"""


def python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def fingerprint(path):
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


@pytest.fixture
def source(write, tmp_path):
    seed = torch.Generator().manual_seed(1)
    tensors = {f"w{i}": torch.randn(100, 100, generator=seed).to(torch.bfloat16) for i in range(9)}
    path = write(tmp_path / "m", tensors, shards=2)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def whole(source):
    return fingerprint(convert(source, target=source.with_name("w"), max_shard_bytes=40_000).target)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 0.99])
def test_killed_and_taken_up_again(source, whole, at):
    target, partial = source.with_name("m-float16"), source.with_name("m-float16.partial")
    died = python(KILLED, source, at)
    assert died.returncode == -signal.SIGKILL
    assert partial.is_dir()
    assert not target.exists()
    report = convert(source, max_shard_bytes=40_000)
    assert len(report.kept_shards) == int(at * 9) // 2  # two tensors of nine a shard
    assert fingerprint(target) == whole
    assert sorted(os.listdir(source.parent)) == ["m", "m-float16", "w"]
    again = convert(source, target=source.with_name("w"), max_shard_bytes=40_000, force=True)
    assert report.tensors == again.tensors  # kept shards report like converted ones


def test_killed_before_publication(source, whole, tmp_path):
    code = KILLED.replace(
        "convert(sys", "os.rename = lambda *a: progress(1, 0)\nPath = __import__('pathlib').Path\n"
        "Path.rename = lambda *a: progress(1, 0)\nconvert(sys"
    )  # fmt: skip
    assert python(code, source, 2).returncode == -signal.SIGKILL
    assert not source.with_name("m-float16").exists()
    convert(source, max_shard_bytes=40_000)
    assert fingerprint(source.with_name("m-float16")) == whole


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "header"])
def test_a_damaged_finished_shard_is_made_again(source, whole, damage):
    assert python(KILLED, source, 0.99).returncode == -signal.SIGKILL
    partial = source.with_name("m-float16.partial")
    shard = partial / "model-00002-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    if damage in ("flip", "header"):
        data[-1 if damage == "flip" else 12] ^= 1
    if damage == "truncate":
        data = data[:-1]
    if damage == "extend":
        data += b"\0"
    shard.unlink()
    if damage != "remove":
        shard.write_bytes(data)
    report = convert(source, max_shard_bytes=40_000)
    assert len(report.kept_shards) == 3
    assert shard.name not in report.kept_shards
    assert fingerprint(report.target) == whole


def test_a_changed_source_is_converted_again(source):
    assert python(KILLED, source, 0.99).returncode == -signal.SIGKILL
    shard = source / "model-00001-of-00002.safetensors"
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x80  # the sign of one weight
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = convert(source, max_shard_bytes=40_000)
    fresh = convert(source, target=source.with_name("fresh"), max_shard_bytes=40_000)
    assert 0 < len(report.kept_shards) < 4
    assert fingerprint(report.target) == fingerprint(fresh.target)


def test_another_plan_and_strange_files_do_not_survive(source):
    assert python(KILLED, source, 0.99).returncode == -signal.SIGKILL
    partial = source.with_name("m-float16.partial")
    (partial / "stray").mkdir()
    (partial / "stray" / "file").write_text("x")
    report = convert(source, max_shard_bytes=10**9, weights_only=True)
    assert report.kept_shards == ()
    assert sorted(fingerprint(report.target)) == ["config.json", "model.safetensors"]


def test_a_limit_of_the_system_is_one_sentence(source):
    code = (
        "import resource, sys, bfloat16_to_float16 as b\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(b.main([sys.argv[1], '--max-shard-bytes', '130000']))"
    )
    run = python(code, source)
    assert run.returncode == 2
    *_, sentence = run.stderr.splitlines()
    assert "File too large" in sentence
    assert "Traceback" not in run.stderr
    assert os.listdir(source.parent) == ["m"]


MEASURED = """
import re, sys
import harness.checkpoint.float16 as f

def peak():
    # Not ru_maxrss: a child inherits that from whatever process started it.
    text = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", text)[1])

before = peak()
f.convert(sys.argv[1])
print((peak() - before) * 1024)
"""


def test_memory_stays_below_three_times_the_largest_tensor(tmp_path):
    """Three tensors of 300 MB; the file is sparse, which a mapping does not know."""
    largest, number = 300_000_000, 3
    header = {
        f"w{i}": {
            "dtype": "BF16",
            "shape": [largest // 2],
            "data_offsets": [i * largest, (i + 1) * largest],
        }
        for i in range(number)
    }
    text = json.dumps(header).encode()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with (tmp_path / "m" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + number * largest)
    run = python(MEASURED, tmp_path / "m", check=True)
    assert 0 < int(run.stdout) < 3 * largest
    assert (tmp_path / "m-float16" / "model.safetensors").stat().st_size > number * largest
