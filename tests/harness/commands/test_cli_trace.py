"""``trace`` and ``check --traces``: what another process computed is judged like a subject."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.measure.taps import places
from harness.pipeline import parse_config

SCRIPT = Path(__file__).with_name("foreign_mpt.py")


@pytest.fixture(scope="module")
def dumped(small, prompts, tmp_path_factory):
    """A dump of the Relax subject."""
    from harness.dump import write_dump
    from harness.pipeline import Request

    path = tmp_path_factory.mktemp("dump") / "relax.safetensors"
    write_dump(Request(checkpoint=small, prompts=str(prompts)), path)
    return path


def contents(path):
    with safe_open(str(path), framework="pt") as file:
        return load_file(path), dict(file.metadata() or {})


@pytest.fixture
def spoil(dumped, tmp_path):
    """Write the dump again with its tensors and metadata changed."""

    def write(change):
        tensors, metadata = contents(dumped)
        change(tensors, metadata)
        path = tmp_path / "spoilt.safetensors"
        save_file(tensors, path, metadata=metadata)
        return path

    return write


def judged(command, small, path, tmp_path, *options):
    record = tmp_path / "record.json"
    ran = command("check", small, "--traces", path, "--json", record, *options)
    return ran, json.loads(record.read_text()) if record.exists() else None


# -- what trace writes ---------------------------------------------------------------------------


def test_a_dump_holds_every_tap_of_every_case(dumped, config):
    tensors, metadata = contents(dumped)
    parsed = parse_config(config, "config")
    paths = {place.path for place in places(parsed)}
    cases = ("p.0", "p.1", "batch of two")
    expected = {f"{case}/{path}" for case in cases for path in paths - {"alibi"}} | {"p.0/alibi"}
    expected |= {f"{case}/{key}" for case in cases for key in ("input_ids", "forward")}
    assert set(tensors) == expected
    assert metadata["subject"] == "relax-llvm"
    assert metadata["dtype"] == "float16"
    assert metadata["scores"] == "float32"
    assert re.fullmatch("[0-9a-f]{64}", metadata["checkpoint"])
    assert tensors["p.0/transformer.blocks.1.attn.Wqkv"].shape == (1, 12, 144)


def test_the_storage_dtype_stays(command, small, prompts, tmp_path):
    path = tmp_path / "bf.safetensors"
    ran = command("trace", small, "-o", path, "--prompts", prompts, "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    assert re.fullmatch(re.escape(str(path)) + r": 76 tensors\n", ran.out)
    tensors, _ = contents(path)
    assert tensors["p.0/transformer.blocks.0.output"].dtype == torch.bfloat16
    ran, record = judged(command, small, path, tmp_path, "--dtype", "bfloat16")
    assert ran.code == 0, ran.out
    assert record["verdict"] == "conforms"


def test_a_dump_that_fails_leaves_nothing(command, small, prompts, tmp_path, monkeypatch):
    import safetensors.torch

    def fails(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    ran = command("trace", small, "-o", tmp_path / "d.safetensors", "--prompts", prompts)
    assert ran.code == 2
    assert "No space left on device" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_subject_that_raises_is_no_dump(command, small, prompts, tmp_path, monkeypatch):
    (tmp_path / "broken_subject.py").write_text(
        "class Broken:\n"
        "    name, dtype = 'broken', 'float16'\n"
        "    def forward(self, ids, lengths=None):\n"
        "        raise RuntimeError('out of order')\n"
        "def load(checkpoint, *, dtype, target):\n"
        "    return Broken()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "d.safetensors"
    ran = command(
        "trace", small, "-o", out, "--prompts", prompts, "--subject", "broken_subject:load"
    )
    assert ran.code == 3
    assert "out of order" in ran.err
    assert not out.exists()


# -- the round trip ------------------------------------------------------------------------------


def test_a_dump_of_the_port_conforms(command, small, dumped, tmp_path):
    ran, record = judged(command, small, dumped, tmp_path)
    assert ran.code == 0, ran.out
    taps = record["compared"]["taps"]
    assert taps["compared"] == taps["expected"] == 24
    # Both sets of logits were judged, and compared with each other.
    assert {tap["tap"] for tap in record["taps"] if tap["mode"] == "deployed"} == {
        "logits",
        "forward-chain",
    }


@pytest.mark.parametrize(
    ("fault", "tap", "layer"),
    [
        ("softmax-scale-twice@1", "transformer.blocks.1.attn.context", 1),
        ("gelu-quick@0", "transformer.blocks.0.ffn.act", 0),
        ("norm-2-skipped@1", "transformer.blocks.1.norm_2", 1),
        ("alibi-absent", "alibi", 0),
    ],
)
def test_a_planted_fault_is_located_in_the_dump(
    command, small, prompts, tmp_path, fault, tap, layer
):
    path = tmp_path / "faulty.safetensors"
    assert command("trace", small, "-o", path, "--prompts", prompts, "--fault", fault).code == 0
    ran, record = judged(command, small, path, tmp_path)
    assert ran.code == 1
    assert record["first_divergence"]["tap"] == tap
    assert record["first_divergence"]["layer"] == layer
    assert fault in record["subject"]["name"]


def test_logits_of_a_forward_that_is_not_the_chain_are_seen(command, small, spoil, tmp_path):
    def other(tensors, metadata):
        tensors["p.1/forward"] = tensors["p.1/forward"] * 2

    ran, record = judged(command, small, spoil(other), tmp_path)
    assert ran.code == 1
    assert {tap["tap"] for tap in record["taps"] if tap["verdict"] == "diverges"} == {
        "logits",
        "forward-chain",
    }
    assert record["first_divergence"]["mode"] == "deployed"


@pytest.mark.parametrize("option", ["--fault", "--prompts", "--max-tokens"])
def test_what_a_dump_cannot_follow_is_refused(command, small, dumped, prompts, option):
    value = {"--fault": "gelu-tanh", "--prompts": prompts, "--max-tokens": 3}[option]
    ran = command("check", small, "--traces", dumped, option, value)
    assert ran.code == 2
    assert option in ran.err


# -- dumps of others -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(small, tmp_path_factory):
    """A dump by a process of torch and safetensors alone, which sees no file of this package."""
    folder = tmp_path_factory.mktemp("foreign")
    subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(small), "foreign.safetensors"],
        cwd=folder,
        check=True,
    )
    return folder / "foreign.safetensors"


def test_another_process_conforms(command, small, foreign, tmp_path):
    ran, record = judged(command, small, foreign, tmp_path)
    assert ran.code == 0, ran.out
    assert record["compared"]["taps"]["skipped"] == []
    assert record["compared"]["positions"]["compared"] == 12


def test_another_process_with_a_mistake_is_located(command, small, foreign, tmp_path):
    wrong = foreign.with_name("wrong.safetensors")
    command_line = [sys.executable, "-I", str(SCRIPT), str(small), wrong.name, "1"]
    subprocess.run(command_line, cwd=foreign.parent, check=True)
    ran, record = judged(command, small, wrong, tmp_path)
    assert ran.code == 1
    assert record["first_divergence"]["tap"] == "transformer.blocks.1.ffn.act"


PARTS = {
    "logits alone": r"^logits$",
    "streams": r"\.output$|^logits$",
    "one layer": r"blocks\.1\.",
    "no embedding": r"^(?!transformer\.wte)",
    "no inputs of the first step": r"^(?!.*norm_1)",
}


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_dump_conforms_and_says_what_it_lacks(command, small, spoil, tmp_path, part):
    def keep(tensors, metadata):
        for key in list(tensors):
            tap = key.partition("/")[2]
            if tap != "input_ids" and not re.search(PARTS[part], tap):
                del tensors[key]

    ran, record = judged(command, small, spoil(keep), tmp_path)
    assert ran.code == 0, ran.out
    taps = record["compared"]["taps"]
    left_out = sum(skip["count"] for skip in taps["skipped"])
    assert 0 < taps["compared"] == taps["expected"] - left_out
    assert {skip["reason"] for skip in taps["skipped"]} == {"not in the dump"}


def test_the_bias_alone_says_nothing_of_a_position(command, small, spoil, tmp_path):
    def keep(tensors, metadata):
        for key in set(tensors) - {"p.0/alibi", "p.0/input_ids"}:
            del tensors[key]

    ran, record = judged(command, small, spoil(keep), tmp_path)
    assert ran.code == 3
    assert record["compared"]["positions"] == {"expected": 12, "compared": 0, "skipped": []}


def test_keys_without_a_case_are_one_case(command, small, spoil, tmp_path):
    def bare(tensors, metadata):
        for key in list(tensors):
            array = tensors.pop(key)
            if key.startswith("p.0/"):
                tensors[key.removeprefix("p.0/")] = array

    ran, record = judged(command, small, spoil(bare), tmp_path)
    assert ran.code == 0, ran.out
    assert record["logits"][0]["case"] == "dump"


def test_a_wrong_shape_is_located(command, small, spoil, tmp_path):
    def cut(tensors, metadata):
        key = "p.0/transformer.blocks.1.ffn.act"
        tensors[key] = tensors[key][..., :-1].contiguous()

    ran, record = judged(command, small, spoil(cut), tmp_path)
    assert ran.code == 1
    assert record["first_divergence"]["tap"] == "transformer.blocks.1.ffn.act"
    assert "(1, 12, 191), expected (1, 12, 192)" in record["first_divergence"]["reason"]


def test_a_bias_of_other_heads_is_a_failure(command, small, spoil, tmp_path):
    def cut(tensors, metadata):
        tensors["p.0/alibi"] = tensors["p.0/alibi"][:5].contiguous()

    ran, record = judged(command, small, spoil(cut), tmp_path)
    assert ran.code == 1
    assert "expected (6, query, key)" in record["first_divergence"]["reason"]


def test_the_originals_bias_has_a_batch_axis(command, small, spoil, tmp_path):
    def lift(tensors, metadata):
        tensors["p.0/alibi"] = tensors["p.0/alibi"][None]

    assert judged(command, small, spoil(lift), tmp_path)[0].code == 0


def test_not_a_number_is_no_agreement(command, small, spoil, tmp_path):
    def lose(tensors, metadata):
        tensors["p.1/transformer.blocks.0.attn.out_proj"][0, 3, 5] = float("nan")

    ran, record = judged(command, small, spoil(lose), tmp_path)
    assert ran.code == 1
    assert record["first_divergence"]["tap"] == "transformer.blocks.0.attn.out_proj"
    assert record["first_divergence"]["token"] == 3


BAD = {
    "without ids": (lambda t, m: t.pop("p.1/input_ids"), "case 'p.1' has no token ids"),
    "ids of floats": (
        lambda t, m: t.update({"p.0/input_ids": torch.ones(1, 12)}),
        "token ids must be integers",
    ),
    "ids beyond the vocabulary": (
        lambda t, m: t.update({"p.0/input_ids": torch.full((1, 12), 97)}),
        "token id out of range",
    ),
    "no taps": (
        lambda t, m: [t.pop(k) for k in list(t) if k.startswith("p.1/") and "input" not in k],
        "case 'p.1' holds no taps",
    ),
    "a strange name": (
        lambda t, m: t.update({"p.0/transformer.blocks.2.output": torch.ones(1, 12, 48)}),
        "'transformer.blocks.2.output' of case 'p.0' is not a tap of this config",
    ),
    "a tap of one case": (
        lambda t, m: t.pop("p.1/transformer.blocks.0.norm_2"),
        "case 'p.1' lacks 'transformer.blocks.0.norm_2'",
    ),
    "an empty tap": (
        lambda t, m: t.update({"p.0/logits": torch.ones(1, 12, 0)}),
        "p.0/logits is empty",
    ),
    "integers": (
        lambda t, m: t.update({"p.0/logits": torch.ones(1, 12, 97, dtype=torch.int32)}),
        "p.0/logits has another dtype than the dump; expected float16, or wider, found int32",
    ),
    "another two-byte type": (
        lambda t, m: t.update({"p.0/logits": t["p.0/logits"].bfloat16()}),
        "found bfloat16 (--dtype bfloat16)",
    ),
    "a byte wide": (
        lambda t, m: t.update({"p.0/logits": torch.ones(1, 12, 97).to(torch.float8_e4m3fn)}),
        "'p.0/logits' has a dtype that cannot be judged",
    ),
    "another dtype": (lambda t, m: m.update(dtype="bfloat16"), "the dump is of another dtype"),
    "an unknown dtype": (lambda t, m: m.update(dtype="int4"), "metadata dtype: unknown"),
    "an unknown rounding": (lambda t, m: m.update(scores="fp8"), "metadata scores: unknown"),
    "another checkpoint": (lambda t, m: m.update(checkpoint="0" * 64), "on another checkpoint"),
    "a tap twice": (
        lambda t, m: (
            [t.update({k.replace("p.0/", "dump/"): t.pop(k)}) for k in list(t) if "p.0/" in k]
            + [t.update({"logits": torch.ones(1, 12, 97)})]
        ),
        "tap 'logits' is there with and without a case",
    ),
    "nothing": (lambda t, m: t.clear(), "the dump is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_dump_that_cannot_be_judged_is_bad_input(command, small, spoil, tmp_path, kind):
    change, sentence = BAD[kind]
    path = spoil(change)
    ran, record = judged(command, small, path, tmp_path)
    assert ran.code == 2
    assert record is None
    assert sentence in ran.err
    assert str(path) in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_bad_input(command, small, dumped, tmp_path, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(dumped.read_bytes()[:kept])
    ran = command("check", small, "--traces", path)
    assert ran.code == 2
    assert f"{path}: not a safetensors file" in ran.err
    assert ran.err.count("\n") == 1


def test_a_header_beyond_the_file_is_bad_input(command, small, tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert command("check", small, "--traces", path).code == 2


def test_a_missing_file_is_bad_input(command, small, tmp_path):
    ran = command("check", small, "--traces", tmp_path / "absent.safetensors")
    assert ran.code == 2
    assert "there is no such file" in ran.err


def test_the_golden_itself_is_not_proven(command, small, dumped, spoil, tmp_path):
    """A dump without any rounding error was not made by the implementation it speaks of."""
    from harness.checkpoint.reader import Checkpoint
    from harness.measure.oracle import Oracle
    from harness.subjects.protocol import Rounding

    opened = Checkpoint.open(small)
    config = parse_config(opened.config, "config")
    rounding = Rounding(scores="float32", probabilities="float32")
    oracle = Oracle(config, opened.read, storage="float16", rounding=rounding)

    def golden(tensors, metadata):
        ids = tensors["p.0/input_ids"]
        tensors.clear()
        stream = oracle.part("embed").embed(oracle.golden, ids)
        tensors["p.0/input_ids"] = ids
        hidden = stream["hidden"]
        for layer in range(config.n_layers):
            taps = oracle.part(layer).chain(oracle.golden, hidden)
            hidden = taps["output"]
            tensors |= {f"p.0/transformer.blocks.{layer}.{k}": v for k, v in taps.items()}
        tensors |= {
            f"p.0/{k}": v for k, v in oracle.part("head").chain(oracle.golden, hidden).items()
        }
        for key, tensor in tensors.items():
            tensors[key] = tensor.clone().contiguous()

    ran, record = judged(command, small, spoil(golden), tmp_path)
    assert ran.code == 3
    assert "golden itself" in record["reason"]
    assert np.isfinite([tap["ratio"] for tap in record["taps"]]).all()
