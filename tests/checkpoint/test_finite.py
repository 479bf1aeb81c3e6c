"""Weights that are infinite or NaN are named with their first index."""

from __future__ import annotations

import pytest
import torch

from harness.checkpoint import Checkpoint, check_finite, finite
from harness.errors import BadInput

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
def test_the_first_bad_index_is_named(write, tmp_path, monkeypatch, dtype, bad, kind):
    monkeypatch.setattr(finite, "_STEP", 8)  # the bad ones lie in the second step
    weights = torch.ones(4, 5, dtype=dtype)
    weights[2, 3] = weights[3, 4] = bad
    write(tmp_path, {"fine": torch.ones(3), "bad": weights}, kind=kind)
    with pytest.raises(BadInput, match=r"'bad' is not finite at index \[2, 3\]") as caught:
        check_finite(Checkpoint.open(tmp_path))
    assert str(bad) in str(caught.value)


def test_a_duplicate_is_looked_at_too(write, tmp_path):
    write(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2, kind="pytorch")
    torch.save({"a": torch.tensor([float("nan")])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="'a' is not finite"):
        check_finite(Checkpoint.open(tmp_path))


def test_what_was_looked_at_is_counted(write, tmp_path):
    tensors = {"a": torch.ones(4, 5), "i": torch.ones(7, dtype=torch.int64), "e": torch.ones(0)}
    write(tmp_path, {**tensors, "s": torch.tensor(65504.0).half()})
    assert check_finite(Checkpoint.open(tmp_path)) == 4 * 5 + 1
