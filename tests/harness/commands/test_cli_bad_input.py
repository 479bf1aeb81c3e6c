"""Bad input: exit code 2, one sentence that names file and field, and nothing left behind."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

FIRST, SECOND = (f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def refused(command, tmp_path):
    """Run ``check``, and return its one sentence."""

    def run(*words, code=2):
        results = tmp_path / "results"
        results.mkdir()
        before = listing(tmp_path)
        ran = command("check", *words, "--json", results / "r.json", "--html", results / "r.html")
        assert ran.code == code, ran.out + ran.err
        assert "Traceback" not in ran.err
        assert ran.err.startswith("mpt-conform: ")
        assert ran.err.count("\n") == 1, ran.err
        assert ran.out == ""
        assert listing(tmp_path) == before, "something was left behind"
        return ran.err

    return run


def listing(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def edit_config(folder, change):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def edit_shard(folder, change, shard=SECOND):
    state = torch.load(folder / shard, weights_only=True)
    change(state)
    torch.save(state, folder / shard)


# -- the checkpoint --------------------------------------------------------------------------------


def test_an_absent_directory(refused, tmp_path):
    assert "absent: the directory does not exist" in refused(tmp_path / "absent")


def test_a_file_for_a_directory(refused, copied):
    assert "config.json: not a directory" in refused(copied / "config.json")


def test_no_config(refused, copied):
    (copied / "config.json").unlink()
    assert "config.json" in refused(copied)


def test_a_config_that_is_no_json(refused, copied):
    (copied / "config.json").write_text("{")
    assert "config.json: the file is not valid JSON" in refused(copied)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_shard(refused, copied, share):
    whole = (copied / SECOND).read_bytes()
    (copied / SECOND).write_bytes(whole[: int(len(whole) * share)])
    assert SECOND in refused(copied)


def test_an_index_that_names_a_missing_file(refused, copied):
    (copied / SECOND).unlink()
    assert SECOND in refused(copied)


def test_an_index_that_leads_out_of_the_directory(refused, copied):
    index = json.loads((copied / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.bin"
    (copied / INDEX).write_text(json.dumps(index))
    assert INDEX in refused(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(refused, copied, value):
    def spoil(state):
        state["transformer.norm_f.weight"][7] = value

    edit_shard(copied, spoil)
    sentence = refused(copied)
    assert "tensor 'transformer.norm_f.weight' is not finite at index [7]" in sentence
    assert SECOND in sentence


def test_a_malicious_pickle_does_not_run(refused, copied, tmp_path):
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self):
            return (open, (str(victim), "w"))

    path = copied / SECOND
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            evil = pickle.dumps({"transformer.norm_f.weight": Payload()}, protocol=2)
            new.writestr(name, evil if name.endswith("data.pkl") else content)
    sentence = refused(copied)
    assert SECOND in sentence
    assert not victim.exists()


def test_a_missing_tensor(refused, copied):
    edit_shard(copied, lambda state: state.pop("transformer.norm_f.weight"))
    assert "transformer.norm_f.weight" in refused(copied)


def test_an_empty_directory(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


# -- the config ------------------------------------------------------------------------------------

FIELDS = {
    "d_model": ("48", "d_model"),
    "n_layers": (0, "n_layers"),
    "n_heads": (7, "n_heads"),
    "vocab_size": (True, "vocab_size"),
    "max_seq_len": (-1, "max_seq_len"),
    "expansion_ratio": (None, "expansion_ratio"),
    "no_bias": ("yes", "no_bias"),
    "norm_type": ("batchnorm", "norm_type"),
    "logit_scale": ("inverse", "logit_scale"),
    "attn_config": ([], "attn_config"),
    "tie_word_embeddings": (1, "tie_word_embeddings"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_field_of_a_wrong_type_or_value(refused, copied, field):
    value, named = FIELDS[field]
    edit_config(copied, lambda raw: raw.update({field: value}))
    sentence = refused(copied)
    assert f"{copied / 'config.json'}: {named}" in sentence


@pytest.mark.parametrize(
    ("field", "value"), [("clip_qkv", "6"), ("alibi", 1), ("attn_type", "none"), ("rope", True)]
)
def test_a_field_of_the_attention(refused, copied, field, value):
    edit_config(copied, lambda raw: raw["attn_config"].update({field: value}))
    assert f"attn_config.{field}" in refused(copied)


def test_heads_that_do_not_divide_the_width(refused, copied):
    edit_config(copied, lambda raw: raw.update(n_heads=5))
    sentence = refused(copied)
    assert "n_heads" in sentence
    assert "48" in sentence


def test_a_config_of_another_size_than_the_weights(refused, copied):
    edit_config(copied, lambda raw: raw.update(vocab_size=98))
    assert "tensor transformer.wte.weight is misshapen: expected shape (98, 48)" in refused(copied)


# -- prompts ---------------------------------------------------------------------------------------

PROMPTS = {
    "out of range": ([[1, 97]], "position 1; expected 0..96, found 97"),
    "negative": ([[1, -1]], "-1"),
    "empty": ([], "expected"),
    "an empty row": ([[]], "expected"),
    "too long": ([[1] * 65], "max_seq_len"),
    "ragged": ([[1, 2], [3]], "expected"),
    "floats": ([[1.5]], "1.5"),
    "booleans": ([[True]], "expected"),
    "no list": ({"ids": 1}, "expected"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_that_cannot_be_used(refused, small, tmp_path, kind):
    content, named = PROMPTS[kind]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    sentence = refused(small, "--prompts", path)
    assert named in sentence
    assert "bad" in sentence


def test_an_empty_text(refused, small, tmp_path):
    (tmp_path / "bad.txt").write_text("")
    assert "bad.txt" in refused(small, "--prompts", tmp_path / "bad.txt")


def test_an_empty_folder_of_prompts(refused, small, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(small, "--prompts", tmp_path / "folder")


def test_a_pickled_array(refused, small, tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "bad.npy" in refused(small, "--prompts", tmp_path / "bad.npy")


def test_an_absent_file_of_prompts(refused, small, tmp_path):
    assert "absent.json" in refused(small, "--prompts", tmp_path / "absent.json")


# -- options ---------------------------------------------------------------------------------------

SUBJECTS = {
    "rellax": "unknown subject",
    "no_such_module_here:load": "there is no module 'no_such_module_here'",
    "json:load_nothing": "module json has no callable 'load_nothing'",
    "json:decoder": "module json has no callable 'decoder'",
    ":load": "unknown subject",
    "made_up:Nothing": "no callable `forward`",
    "made_up:NoDtype": "storage dtype",
    "made_up:NoName": "has no name",
    "made_up:OtherProtocol": "another protocol version",
    "made_up:WrongRounding": "rounding is not a Rounding",
    "broken_here:load": "importing it raised ZeroDivisionError",
}
MADE_UP = """
class Base:
    def __init__(self, checkpoint, *, dtype, target): pass
    name, dtype = "made up", "float16"
    def forward(self, input_ids, lengths=None): raise RuntimeError
class NoDtype(Base): dtype = "int8"
class NoName(Base): name = None
class OtherProtocol(Base): protocol = 3
class WrongRounding(Base): rounding = "float32"
def Nothing(checkpoint, *, dtype, target): return None
"""


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_that_cannot_be_made(refused, small, prompts, tmp_path, monkeypatch, name):
    (tmp_path / "made_up.py").write_text(MADE_UP)
    (tmp_path / "broken_here.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "made_up", raising=False)
    sentence = refused(small, "--prompts", prompts, "--subject", name)
    assert SUBJECTS[name] in sentence
    assert name.partition(":")[0] in sentence


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("gelu-tan", "did you mean gelu-tanh?"),
        ("zzzz", "`mpt-conform faults` lists all"),
        ("gelu-tanh@2", "no such layer; expected 0..1, found 2"),
        ("gelu-tanh@x", "no such layer"),
        ("norm-f-gamma-ones@0", "cannot be confined to one layer"),
    ],
)
def test_a_fault_that_is_not_there(refused, small, prompts, fault, named):
    assert named in refused(small, "--prompts", prompts, "--fault", fault)


def test_a_fault_needs_the_port(refused, small, prompts):
    words = (small, "--prompts", prompts, "--subject", "torch", "--fault", "gelu-tanh")
    assert "--fault" in refused(*words)


@pytest.mark.parametrize(
    ("layers", "named"), [("2", "0..1"), ("0-5", "0..1"), ("x", "'x'"), ("", "''"), ("1-0", "none")]
)
def test_layers_that_are_not_there(refused, small, prompts, layers, named):
    sentence = refused(small, "--prompts", prompts, "--layers", layers)
    assert "--layers" in sentence
    assert named in sentence


@pytest.mark.parametrize(
    "target", ["abacus", "{", '{"kind": "abacus"}', '{"kind": "llvm", "x": 1}']
)
def test_a_target_that_is_unknown(refused, small, prompts, target):
    sentence = refused(small, "--prompts", prompts, "--target", target)
    assert "--target: this is no target" in sentence


@pytest.mark.parametrize("words", [("--dtype", "int4"), ("--max-tokens", "0"), ("--nonsense",)])
def test_usage(command, small, words):
    ran = command("check", small, *words)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert words[0] in ran.err


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("kind", ["no such folder", "a folder", "a file for a folder"])
def test_a_result_that_cannot_be_written(command, small, prompts, tmp_path, option, kind):
    (tmp_path / "file").write_text("")
    target = {
        "no such folder": tmp_path / "absent" / "r",
        "a folder": tmp_path,
        "a file for a folder": tmp_path / "file" / "r",
    }[kind]
    before = listing(tmp_path)
    ran = command("check", small, "--prompts", prompts, option, target)
    assert ran.code == 2
    assert f"{target}: cannot be written" in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == "", "it is refused before the work, not after"
    assert listing(tmp_path) == before


def test_a_dump_that_cannot_be_written(command, small, prompts, tmp_path):
    ran = command("trace", small, "--prompts", prompts, "-o", tmp_path / "absent" / "d")
    assert ran.code == 2
    assert "cannot be written" in ran.err


@pytest.mark.parametrize("name", ["map", "trace", "convert", "topology"])
def test_other_commands_say_it_too(command, copied, tmp_path, name):
    (copied / "config.json").write_text('{"d_model": "wide"}')
    (copied / FIRST).write_bytes(b"")
    words = ("-o", tmp_path / "d") if name == "trace" else ()
    ran = command(name, copied, *words)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert str(copied) in ran.err
