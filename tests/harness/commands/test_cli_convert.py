"""``convert``: the script of the repository under another name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cases.synthetic import make_checkpoint
from harness.checkpoint.reader import Checkpoint


@pytest.fixture
def source(config, tmp_path):
    return make_checkpoint(tmp_path / "m", config, seed=1, dtype="bfloat16")


def test_a_checkpoint_is_converted_beside_itself(command, source, tmp_path):
    ran = command("convert", source, "--json", tmp_path / "c.json")
    assert ran.code == 0, ran.err
    made, original = Checkpoint.open(tmp_path / "m-float16"), Checkpoint.open(source)
    assert set(made.names) == set(original.names)
    for name in original.names:
        expected = original.read(name).astype(np.float32).astype(np.float16)
        assert (made.read(name).view(np.uint16) == expected.view(np.uint16)).all()
    assert json.loads((tmp_path / "c.json").read_text())["tensors"] == len(original.names)


def test_an_existing_result_needs_force(command, source):
    assert command("convert", source).code == 0
    ran = command("convert", source)
    assert ran.code == 2
    assert "the target exists already (--force replaces it)" in ran.err
    assert command("convert", source, "--force").code == 0


def test_an_overflow_needs_leave(command, config, tmp_path):
    import torch

    source = make_checkpoint(tmp_path / "m", config, seed=1, dtype="bfloat16", shards=1)
    path = source / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    state["transformer.norm_f.weight"][0] = 1e6
    torch.save(state, path)
    ran = command("convert", source)
    assert ran.code == 2
    assert "'transformer.norm_f.weight'" in ran.err
    assert not (tmp_path / "m-float16").exists()
    assert command("convert", source, "--allow-overflow").code == 0


def test_side_files_and_shards_follow_the_options(command, source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    ran = command("convert", source, "--weights-only", "--max-shard-bytes", 30000)
    assert ran.code == 0, ran.err
    made = {path.name for path in (tmp_path / "m-float16").iterdir()}
    assert "tokenizer.json" not in made
    assert sum(name.endswith(".safetensors") for name in made) > 2


def test_what_is_no_checkpoint_is_bad_input(command, tmp_path):
    ran = command("convert", tmp_path / "absent")
    assert ran.code == 2
    assert "the directory does not exist" in ran.err
