"""``map``: every tensor consumed once, in place, or named."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cases.exposure import materialise
from cases.synthetic import make_checkpoint
from harness.checkpoint.reader import Checkpoint
from harness.faults.library import library
from harness.faults.model import Fault, Planted
from harness.mapping import _rows, prove_mapping

ATTENTION = {"alibi": True}
CONFIG = {
    "model_type": "mpt",
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 6,
    "vocab_size": 97,
    "max_seq_len": 64,
    "expansion_ratio": 4,
    "no_bias": True,
    "attn_config": ATTENTION,
}
CONFIGS = {
    "trained": CONFIG,
    "biases": {**CONFIG, "no_bias": False},
    "qk-ln": {**CONFIG, "attn_config": {**ATTENTION, "qk_ln": True}},
    "grouped-query": {
        **CONFIG,
        "attn_config": {**ATTENTION, "attn_type": "grouped_query_attention", "kv_n_heads": 3},
    },
    "untied": {**CONFIG, "tie_word_embeddings": False},
}
OF_THE_MAPPER = [f for f in library().values() if f.weights is not None and not f.equivalent]

# The planted digits are 1 to 256: what happens to subnormal numbers only real weights can show.
ONLY_IN_VALUES = {"weights-subnormals-flushed"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def checkpoint(name):
        """One of the above, or else what `cases.exposure` makes to show such a fault."""
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in CONFIGS:
                made[name] = make_checkpoint(folder, CONFIGS[name], seed=5, dtype="bfloat16")
            else:
                made[name] = materialise(name, folder, "bfloat16")
        return made[name]

    return checkpoint


def respelled(source, target, change):
    """Write a checkpoint again as one safetensors file, with its tensors changed."""
    opened = Checkpoint.open(source)
    tensors = {name: np.array(opened.read(name)) for name in opened.names}
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(opened.config))
    return target


def test_every_tensor_is_proved_in_four_ways(command, small, tmp_path):
    ran = command("map", small, "--json", tmp_path / "map.json")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("conforms: 14 of 14 tensors consumed once, in place\n")
    record = json.loads((tmp_path / "map.json").read_text())
    asked = {(proof["question"], proof["layout"]) for proof in record["proofs"]}
    per_layout = ("consumed", "fingerprints", "content")
    assert asked == {("inventory", "")} | {(q, x) for q in per_layout for x in ("rows", "panels")}
    assert all(proof["proved"] == proof["expected"] == 14 for proof in record["proofs"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_config_holds(checkpoints, kind):
    result = prove_mapping(checkpoints(kind))
    assert result.verdict == "conforms", list(result.lines())
    assert result.in_place == result.tensors


@pytest.mark.parametrize("fault", OF_THE_MAPPER, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(checkpoints, fault):
    source = checkpoints(fault.exposure)
    everywhere = prove_mapping(source, fault.name)
    assert everywhere.verdict == "diverges"
    kinds = {finding.kind for finding in everywhere.findings}
    assert kinds == ({"altered"} if fault.name in ONLY_IN_VALUES else {"altered", "misplaced"})
    if not fault.per_layer:
        return
    # A fault of layers concerns two of them even when it is confined to one.
    layer = fault.first_layer or 1
    confined = prove_mapping(source, f"{fault.name}@{layer}")
    named = {finding.tensor for finding in confined.findings}
    assert confined.verdict == "diverges"
    assert any(name.startswith(f"transformer.blocks.{layer}.") for name in named)
    assert all(name.startswith("transformer.blocks.") for name in named)
    assert named <= {finding.tensor for finding in everywhere.findings}


def test_a_planted_fault_names_exactly_its_tensors(command, small):
    ran = command("map", small, "--fault", "wqkv-q-k-swapped@1")
    assert ran.code == 1
    assert ran.out.startswith(
        "diverges: 13 of 14 tensors consumed once, in place with fault wqkv-q-k-swapped@1\n"
    )
    named = {line.split(": ")[1] for line in ran.out.splitlines()[1:] if "transformer." in line}
    assert named == {"transformer.blocks.1.attn.Wqkv.weight"}


def _without_norm_f(weight_map, config, layer):
    sources = {k: v for k, v in weight_map.param_map.items() if k != "transformer.norm_f.weight"}
    return replace(weight_map, param_map=sources)


def _norm_1_twice(weight_map, config, layer):
    sources = dict(weight_map.param_map)
    sources["transformer.norm_f.weight"] = ("transformer.blocks.0.norm_1.weight",)
    return replace(weight_map, param_map=sources)


def _summed(weight_map, config, layer):
    """Use a second tensor beside the right one, so lightly that only consumption shows it."""
    name = "transformer.norm_f.weight"
    sources = weight_map.param_map | {name: (name, "transformer.blocks.0.norm_1.weight")}
    functions = weight_map.map_func | {name: lambda own, other: own}
    return replace(weight_map, param_map=sources, map_func=functions)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (_without_norm_f, {"transformer.norm_f.weight"}),
        (_norm_1_twice, {"transformer.norm_f.weight", "transformer.blocks.0.norm_1.weight"}),
        (_summed, {"transformer.blocks.0.norm_1.weight"}),
    ],
)
def test_a_map_that_is_no_bijection_is_found(small, monkeypatch, weights, named):
    fault = Fault("made-up", "weights", "invented", "trained", "norm_1", "", weights=weights)
    monkeypatch.setattr("harness.mapping.parse", lambda text, n_layers: Planted(fault))
    result = prove_mapping(small, "made-up")
    assert result.verdict == "diverges"
    assert {f.tensor for f in result.findings if f.kind == "unmapped"} == named


def test_a_fault_of_another_part_is_refused(command, small):
    ran = command("map", small, "--fault", "gelu-tanh")
    assert ran.code == 2
    assert "no fault of the weight mapper" in ran.err


FLAWS = {
    "missing": lambda t: t.pop("transformer.blocks.1.norm_2.weight"),
    "unexpected": lambda t: t.update({"transformer.blocks.1.extra": np.ones(3, np.float32)}),
    "misshapen": lambda t: t.update(
        {"transformer.norm_f.weight": np.ones(47, np.float32)},
    ),
    "mistyped": lambda t: t.update(
        {"transformer.norm_f.weight": np.ones(48, ml_dtypes.bfloat16)},
    ),
}
FLAWED = {
    "missing": "transformer.blocks.1.norm_2.weight",
    "unexpected": "transformer.blocks.1.extra",
    "misshapen": "transformer.norm_f.weight",
    "mistyped": "transformer.norm_f.weight",
}


@pytest.mark.parametrize("kind", FLAWS)
def test_a_flaw_of_the_checkpoint_is_named(command, small, tmp_path, kind):
    spoilt = respelled(small, tmp_path / "spoilt", FLAWS[kind])
    ran = command("map", spoilt)
    assert ran.code == 1
    findings = [line.strip() for line in ran.out.splitlines() if line.startswith(f"  {kind}: ")]
    assert len(findings) == 1
    assert findings[0].startswith(f"{kind}: {FLAWED[kind]}: ")


def test_a_tensor_twice_is_named(command, copied):
    import torch

    # A second shard of the index's own naming that repeats a tensor of the first.
    path = copied / "pytorch_model-00002-of-00002.bin"
    state = torch.load(path, weights_only=True)
    index = json.loads((copied / "pytorch_model.bin.index.json").read_text())
    first = next(
        name for name, file in index["weight_map"].items() if file.startswith("pytorch_model-00001")
    )
    held = torch.load(copied / "pytorch_model-00001-of-00002.bin", weights_only=True)
    torch.save({**state, first: held[first]}, path)
    ran = command("map", copied)
    assert ran.code == 1
    assert f"  duplicated: {first}: there 2 times: " in ran.out


def test_undoing_the_layout_sees_what_hides_in_the_padding():
    stored = np.zeros((2, 3, 4))
    stored[1, :, 2] = 1
    with pytest.raises(ValueError, match="padding"):
        _rows(stored, 4, (6, 3))
    assert _rows(stored, 4, (7, 3))[6].tolist() == [1, 1, 1]
