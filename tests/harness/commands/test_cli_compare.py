"""``compare``: two dumps, two records; a difference alone has no limit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.pipeline import Request


@pytest.fixture(scope="module")
def dump_of(small, prompts, tmp_path_factory):
    """Dumps by subject, dtype and fault, each made once."""
    from harness.dump import write_dump

    folder, made = tmp_path_factory.mktemp("dumps"), {}

    def dump(subject="relax", dtype="float16", fault=None):
        key = (subject, dtype, fault)
        if key not in made:
            made[key] = folder / f"{len(made)}.safetensors"
            request = Request(
                checkpoint=small, prompts=str(prompts), subject=subject, dtype=dtype, fault=fault
            )
            write_dump(request, made[key])
        return made[key]

    return dump


@pytest.fixture(scope="module")
def record_of(small, prompts, tmp_path_factory):
    from harness.pipeline import check
    from harness.report.files import to_json

    folder, made = tmp_path_factory.mktemp("records"), {}

    def record(dtype="float16", fault=None):
        key = (dtype, fault)
        if key not in made:
            made[key] = folder / f"{len(made)}.json"
            request = Request(checkpoint=small, prompts=str(prompts), dtype=dtype, fault=fault)
            made[key].write_bytes(to_json(check(request)))
        return made[key]

    return record


def changed(source, target, change):
    with safe_open(str(source), framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(source)
    change(tensors, metadata)
    save_file(tensors, target, metadata=metadata)
    return target


def edited(source, target, change):
    record = json.loads(source.read_text())
    change(record)
    target.write_text(json.dumps(record))
    return target


# -- dumps -----------------------------------------------------------------------------------------


def test_two_runs_of_the_same_are_equal_bit_by_bit(command, dump_of, tmp_path):
    again = shutil.copy(dump_of(), tmp_path / "again.safetensors")
    ran = command("compare", dump_of(), again, "--json", tmp_path / "c.json")
    assert ran.code == 0, ran.out
    assert ran.out.startswith("conforms: 73 tensors are equal bit by bit\n")
    record = json.loads((tmp_path / "c.json").read_text())
    assert len(record["rows"]) == 73
    assert all(row["same"] and row["elements"] > 0 for row in record["rows"])


def test_rows_are_in_order_of_evaluation(command, dump_of, tmp_path):
    again = shutil.copy(dump_of(), tmp_path / "again.safetensors")
    command("compare", dump_of(), again, "--json", tmp_path / "c.json")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    taps = list(dict.fromkeys(row["tap"] for row in rows))
    assert taps[:3] == ["transformer.wte", "alibi", "transformer.blocks.0.norm_1"]
    assert taps[11:13] == ["transformer.blocks.0.output", "transformer.blocks.1.norm_1"]
    assert taps[-3:] == ["transformer.norm_f", "logits", "forward"]


def test_one_bit_is_seen_and_alone_proves_nothing(command, dump_of, tmp_path):
    def flip(tensors, metadata):
        tensors["p.1/transformer.blocks.1.norm_2"].view(torch.int16)[0, 2, 3] ^= 1

    ran = command("compare", dump_of(), changed(dump_of(), tmp_path / "b.safetensors", flip))
    assert ran.code == 3
    assert "first p.1/transformer.blocks.1.norm_2; only a checkpoint can say" in ran.out
    assert "p.1/transformer.blocks.1.norm_2: 1 of 576 elements differ" in ran.out


def test_the_sign_of_zero_is_a_bit(command, dump_of, tmp_path):
    def zero(tensors, metadata):
        tensors["p.0/logits"][0, 0, 0] = 0.0

    def minus(tensors, metadata):
        tensors["p.0/logits"][0, 0, 0] = -0.0

    a = changed(dump_of(), tmp_path / "a.safetensors", zero)
    b = changed(dump_of(), tmp_path / "b.safetensors", minus)
    assert command("compare", a, b).code == 3


def test_two_right_ones_conform_on_a_checkpoint(command, small, dump_of):
    ran = command("compare", dump_of(), dump_of("torch"), "--checkpoint", small)
    assert ran.code == 0, ran.out
    assert ran.out.startswith("conforms: both conform to the golden and are apart in ")
    assert "of the expected noise (rms)" in ran.out


@pytest.mark.parametrize("wrong_first", [False, True])
def test_a_wrong_one_diverges_on_a_checkpoint(command, small, dump_of, tmp_path, wrong_first):
    wrong = dump_of(fault="norm-2-skipped@1")
    pair = (wrong, dump_of()) if wrong_first else (dump_of(), wrong)
    ran = command("compare", *pair, "--checkpoint", small, "--json", tmp_path / "c.json")
    assert ran.code == 1
    record = json.loads((tmp_path / "c.json").read_text())
    verdicts = {side["path"]: side["verdict"] for side in record["judged"]}
    assert verdicts == {str(wrong): "diverges", str(dump_of()): "conforms"}
    assert "diverges from the golden at transformer.blocks.1.norm_2, layer 1" in ran.out
    noise = {row["tap"]: row["noise"] for row in record["rows"] if row["case"] == "p.0"}
    # The reader is shown where it starts: noise before the fault, far more from there on.
    assert (noise["transformer.blocks.1.attn.residual"] or 0) < 1
    assert noise["transformer.blocks.1.norm_2"] > 100


def test_two_equal_wrong_ones_diverge_on_a_checkpoint(command, small, dump_of, tmp_path):
    wrong = dump_of(fault="norm-2-skipped@1")
    again = shutil.copy(wrong, tmp_path / "again.safetensors")
    assert command("compare", wrong, again).code == 0
    assert command("compare", wrong, again, "--checkpoint", small).code == 1


def test_not_a_number_on_both_sides_is_no_agreement(command, dump_of, tmp_path):
    def lose(tensors, metadata):
        tensors["p.0/transformer.norm_f"][0, 0, 0] = float("nan")

    a = changed(dump_of(), tmp_path / "a.safetensors", lose)
    ran = command("compare", a, shutil.copy(a, tmp_path / "b.safetensors"))
    assert ran.code == 1
    assert "p.0/transformer.norm_f is not finite" in ran.out


def test_less_than_the_other_is_not_proven(command, dump_of, tmp_path):
    def cut(tensors, metadata):
        del tensors["p.0/transformer.blocks.0.output"]

    ran = command("compare", dump_of(), changed(dump_of(), tmp_path / "b.safetensors", cut))
    assert ran.code == 3
    assert f"only in {dump_of()}: p.0/transformer.blocks.0.output" in ran.out


def test_nothing_in_common_is_not_proven(command, dump_of, tmp_path):
    def rename(tensors, metadata):
        for key in list(tensors):
            tensors["other" + key] = tensors.pop(key)

    ran = command("compare", dump_of(), changed(dump_of(), tmp_path / "b.safetensors", rename))
    assert ran.code == 3
    assert "no tap of a case in common" in ran.out


def test_empty_tensors_prove_nothing(command, tmp_path):
    tensors = {"input_ids": torch.ones(1, 2, dtype=torch.int32), "logits": torch.ones(1, 2, 0)}
    for name in "ab":
        save_file(tensors, tmp_path / f"{name}.safetensors")
    ran = command("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert ran.code == 3
    assert "empty" in ran.out


def test_different_inputs_cannot_be_compared(command, dump_of, tmp_path):
    def other(tensors, metadata):
        tensors["p.1/input_ids"][0, 0] += 1

    ran = command("compare", dump_of(), changed(dump_of(), tmp_path / "b.safetensors", other))
    assert ran.code == 2
    assert "case 'p.1' has different token ids" in ran.err


@pytest.mark.parametrize(
    ("field", "what"), [("dtype", "two storage dtypes"), ("checkpoint", "two checkpoints")]
)
def test_two_of_different_origin_cannot_be_compared(command, dump_of, tmp_path, field, what):
    def other(tensors, metadata):
        metadata[field] = "bfloat16"

    ran = command("compare", dump_of(), changed(dump_of(), tmp_path / "b.safetensors", other))
    assert ran.code == 2
    assert what in ran.err


# -- itself, and what is no dump and no record -----------------------------------------------------


@pytest.mark.parametrize("how", ["path", "hard link", "symbolic link"])
@pytest.mark.parametrize("kind", ["dump", "record"])
def test_a_file_with_itself_shows_nothing(command, dump_of, record_of, tmp_path, how, kind):
    path = dump_of() if kind == "dump" else record_of()
    other = tmp_path / "other"
    if how == "path":
        other = path
    else:
        (os.link if how == "hard link" else os.symlink)(path, other)
    ran = command("compare", path, other)
    assert ran.code == 2
    assert "compared with itself shows nothing" in ran.err
    assert ran.err.count("\n") == 1


def test_a_dump_and_a_record_cannot_be_compared(command, dump_of, record_of):
    ran = command("compare", dump_of(), record_of())
    assert ran.code == 2
    assert "found a dump and a record" in ran.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n", "neither a dump nor a record"),
        (b"{}", "schema"),
        (b'{"schema": 99}', "found 99"),
        (b'{"schema": 1, "verdict": "conforms"}', "not a record of check"),
        (b'{"schema": 1,', "not valid JSON"),
    ],
)
def test_what_is_neither_is_bad_input(command, record_of, tmp_path, content, sentence):
    other = tmp_path / "other"
    other.write_bytes(content)
    ran = command("compare", record_of() if content[:1] == b"{" else other, other)
    if content[:1] != b"{":
        ran = command("compare", record_of(), other)
    assert ran.code == 2
    assert sentence in ran.err
    assert ran.err.count("\n") == 1


def test_a_missing_file_is_bad_input(command, record_of, tmp_path):
    ran = command("compare", record_of(), tmp_path / "absent.json")
    assert ran.code == 2
    assert "absent.json: cannot be read" in ran.err


# -- records ---------------------------------------------------------------------------------------


def test_a_second_run_that_got_worse_diverges(command, record_of):
    ran = command("compare", record_of(), record_of(fault="norm-2-skipped@1"))
    assert ran.code == 1
    assert "first transformer.blocks.1.norm_2 (" in ran.out
    assert "conforms -> diverges" in ran.out.splitlines()[1]


def test_a_second_run_that_got_better_conforms(command, record_of):
    ran = command("compare", record_of(fault="norm-2-skipped@1"), record_of())
    assert ran.code == 0, ran.out
    assert "conforms where the first one diverged" in ran.out


def test_both_wrong_is_not_proven(command, record_of, tmp_path):
    wrong = record_of(fault="norm-2-skipped@1")
    ran = command("compare", wrong, shutil.copy(wrong, tmp_path / "again.json"))
    assert ran.code == 3
    assert "the second run itself is: diverges" in ran.out


def test_two_equal_records_conform(command, record_of, tmp_path):
    ran = command("compare", record_of(), shutil.copy(record_of(), tmp_path / "again.json"))
    assert ran.code == 0
    assert "0 of them apart" in ran.out


def cut_tap(record):
    record["taps"] = [t for t in record["taps"] if t["tap"] != "transformer.blocks.0.output"]


def cut_elements(record):
    record["taps"][-1]["elements"] -= 1


@pytest.mark.parametrize("change", [cut_tap, cut_elements])
def test_a_second_run_that_looked_at_less_is_not_proven(command, record_of, tmp_path, change):
    ran = command("compare", record_of(), edited(record_of(), tmp_path / "b.json", change))
    assert ran.code == 3
    assert "looked at less" in ran.out


def test_records_without_a_tap_in_common_are_not_proven(command, record_of, tmp_path):
    def rename(record):
        for tap in record["taps"]:
            tap["tap"] = "other"

    ran = command("compare", record_of(), edited(record_of(), tmp_path / "b.json", rename))
    assert ran.code == 3


def test_a_failure_of_the_second_run_diverges(command, record_of, tmp_path):
    def fail(record):
        record["verdict"] = "diverges"

    ran = command("compare", record_of(), edited(record_of(), tmp_path / "b.json", fail))
    assert ran.code == 1
    assert "a call failed or a tensor was lost" in ran.out


def test_records_of_two_dtypes_cannot_be_compared(command, record_of):
    ran = command("compare", record_of(), record_of(dtype="bfloat16"))
    assert ran.code == 2
    assert "two storage dtypes" in ran.err


def test_records_of_two_checkpoints_cannot_be_compared(command, record_of, tmp_path):
    def other(record):
        record["checkpoint"]["digest"] = "0" * 64

    ran = command("compare", record_of(), edited(record_of(), tmp_path / "b.json", other))
    assert ran.code == 2
    assert "two checkpoints" in ran.err


def test_records_need_no_checkpoint(command, small, record_of, tmp_path):
    again = shutil.copy(record_of(), tmp_path / "again.json")
    ran = command("compare", record_of(), again, "--checkpoint", small)
    assert ran.code == 2
    assert "--checkpoint" in ran.err
