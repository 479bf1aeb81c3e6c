"""Exposures: each shows what it says, and is written whole, once, and the same every time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import exposure
from cases.exposure import EXPOSURES, PUBLISHED, Exposure, materialise, small_config
from cases.synthetic import random_tensor
from cases.topology import tensor_shapes
from reference.config import MPTConfig
from reference.model import Reference
from reference.orders import GOLDEN

NO_ALIBI = {"attn_config": {"alibi": False}, "learned_pos_emb": False}

# What an implementation that lacks the feature would take the config for. Only changes that leave
# the tensors as they are, or need fewer of them; those that need others fail at loading.
WITHOUT: dict[str, dict[str, Any]] = {
    "clip": {"attn_config": {"clip_qkv": None}},
    "clip-qk-ln": {"attn_config": {"clip_qkv": None}},
    "clip-biases": {"attn_config": {"clip_qkv": None}},
    "bias-max-16-heads-12": {"attn_config": {"alibi_bias_max": 8}},
    "bias-max-16-heads-24": {"attn_config": {"alibi_bias_max": 8}},
    "qk-ln": {"attn_config": {"qk_ln": False}},
    "grouped-query-qk-ln": {"attn_config": {"qk_ln": False}},
    "logit-scale": {"logit_scale": None},
    "logit-scale-inverse-root": {"logit_scale": None},
    "softmax-scale": {"attn_config": {"softmax_scale": None}},
    "biases": {"no_bias": True},
    "wpe": {"learned_pos_emb": False},
    "rmsnorm": {"norm_type": "layernorm"},
    "rmsnorm-biases": {"no_bias": True},
    "untied": {"tie_word_embeddings": True},
    "heads-3": NO_ALIBI,
    "heads-5": NO_ALIBI,
    "heads-7": NO_ALIBI,
    "heads-40": NO_ALIBI,
    "long-12-heads": NO_ALIBI,
    "long-32-heads-bias-max-16": {"attn_config": {"alibi_bias_max": 8}},
    "small-embedding": {"layer_norm_epsilon": 1e-6},
    "epsilon-1e-6": {"layer_norm_epsilon": 1e-5},
    "no-positions": {"attn_config": {"alibi": True}},
}
SHAPES = {
    "multi-query",
    "grouped-query",
    "expansion-2",
    "expansion-3",
    "expansion-1.5",
    "vocabulary-padding",
    "layers-12",
}
# Two that change nothing that is computed here, or are compared with themselves.
NEUTRAL = {"embedding-fraction", "loud-scores", "block-7b"}


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    attention = dict(config["attn_config"]) | changes.get("attn_config", {})
    return config | changes | {"attn_config": attention}


def logits(
    made: Exposure, config: dict[str, Any], ids: tuple[int, ...], **order: Any
) -> np.ndarray[Any, Any]:
    shapes = tensor_shapes(made.config)
    cast: dict[str, Any] = {"storage": "float16"} | order
    model = Reference(
        MPTConfig.from_dict(config),
        lambda name: random_tensor(name, shapes[name], made.seed, made.profile).astype(np.float16),
        **cast,
    )
    with torch.no_grad():
        return model.forward(torch.tensor([ids])).double().numpy()


def test_the_lists_above_are_complete() -> None:
    assert set(WITHOUT) | SHAPES | NEUTRAL == set(EXPOSURES)
    assert not (set(WITHOUT) & SHAPES or set(WITHOUT) & NEUTRAL or SHAPES & NEUTRAL)


def relative(found: np.ndarray[Any, Any], golden: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - golden) / np.linalg.norm(golden))


@pytest.mark.parametrize("name", WITHOUT)
def test_its_absence_shows_above_float16_rounding(name: str) -> None:
    """Without the feature float64 is farther off than float16 is with it."""
    made = EXPOSURES[name]
    config = dict(made.config)
    ids = made.prompts()[-1].ids or ()
    golden = logits(made, config, ids, order=GOLDEN)
    rounding = relative(logits(made, config, ids), golden)
    without = relative(logits(made, changed(config, WITHOUT[name]), ids, order=GOLDEN), golden)
    assert np.isfinite(golden).all()
    assert without > 2 * rounding > 0


@pytest.mark.parametrize("name", sorted(set(EXPOSURES) - {"block-7b"}))
def test_float16_can_hold_it(name: str) -> None:
    made = EXPOSURES[name]
    assert np.isfinite(logits(made, dict(made.config), made.prompts()[-1].ids or ())).all()


def test_embedding_fraction_is_neutral_in_exact_arithmetic() -> None:
    made = EXPOSURES["embedding-fraction"]
    config = dict(made.config)
    ids = made.prompts()[-1].ids or ()
    off = logits(made, config | {"embedding_fraction": 1.0}, ids, order=GOLDEN)
    rounding = relative(logits(made, config, ids), off)
    # float64 rounds 2^-42 times as coarsely as float16 does; the same computation, so the same
    # factor, but for the sums, which float16's order keeps in float32: their length at most.
    longest = config["expansion_ratio"] * config["d_model"]
    fraction = logits(made, config, ids, order=GOLDEN)
    assert relative(fraction, off) <= rounding * 2.0**-42 * longest


@pytest.mark.parametrize("name", EXPOSURES)
def test_configs_are_complete_and_prompts_fit(name: str) -> None:
    made = EXPOSURES[name]
    assert made.name == name and made.shows
    assert set(made.config) >= set(PUBLISHED)
    assert MPTConfig.from_dict(dict(made.config)).unknown == ()
    for prompt, length in zip(made.prompts(), made.lengths, strict=True):
        assert len(prompt.ids or ()) == length <= made.config["max_seq_len"]
        assert max(prompt.ids or ()) < made.config["vocab_size"]
    assert made.prompts() == made.prompts()


def test_required_features_are_there() -> None:
    assert {EXPOSURES[f"heads-{n}"].config["n_heads"] for n in (3, 5, 7, 40)} == {3, 5, 7, 40}
    block = dict(EXPOSURES["block-7b"].config)
    assert tensor_shapes(block)["transformer.blocks.0.ffn.up_proj.weight"] == (16384, 4096)
    assert tensor_shapes(block)["transformer.wte.weight"] == (50432, 4096)
    assert max(EXPOSURES["long-12-heads"].lengths) > 512


def test_materialise_is_deterministic_and_cached(tmp_path: Path) -> None:
    one = materialise("biases", tmp_path / "a", "bfloat16")
    two = materialise("biases", tmp_path / "b", "bfloat16")
    assert one.name == two.name
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {
        f.name: f.read_bytes() for f in two.iterdir()
    }
    (one / "config.json").write_text("touched")
    assert materialise("biases", tmp_path / "a", "bfloat16") == one
    assert (one / "config.json").read_text() == "touched"
    assert [path.name for path in (tmp_path / "a").iterdir()] == [one.name]


def test_every_input_of_the_weights_is_in_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Exposure("x", small_config(3, 1), seed=1, shows="")
    variants = [
        made,
        dataclasses.replace(made, seed=2),
        dataclasses.replace(made, config=small_config(3, 1, no_bias=False)),
        dataclasses.replace(made, profile=EXPOSURES["clip"].profile),
    ]
    names = {materialise(variant, tmp_path, "float16").name for variant in variants}
    names.add(materialise(made, tmp_path, "float32").name)
    monkeypatch.setattr(exposure, "RECIPE_FILES", ("synthetic.py",))
    names.add(materialise(made, tmp_path, "float16").name)
    assert len(names) == len(variants) + 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path, *_: Any, **__: Any) -> Path:
        (directory / "config.json").write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(exposure, "make_checkpoint", fail)
        with pytest.raises(OSError, match="disk full"):
            materialise("biases", tmp_path, "float16")
    assert list(tmp_path.iterdir()) == []
    assert (materialise("biases", tmp_path, "float16") / "config.json").is_file()


def test_a_race_is_lost_gracefully(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = exposure.make_checkpoint

    def slow(directory: Path, *arguments: Any, **named: Any) -> Path:
        monkeypatch.setattr(exposure, "make_checkpoint", make)
        materialise("biases", tmp_path, "float16")  # the other process
        return make(directory, *arguments, **named)

    monkeypatch.setattr(exposure, "make_checkpoint", slow)
    target = materialise("biases", tmp_path, "float16")
    assert os.listdir(tmp_path) == [target.name]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="expected one of clip, "):
        materialise("clp", tmp_path, "float16")
    with pytest.raises(ValueError, match="dtype"):
        materialise("clip", tmp_path, "float8")
    assert list(tmp_path.iterdir()) == []
