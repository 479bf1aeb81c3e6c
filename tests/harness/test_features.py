"""Every feature of a config: the port has it right, and a check would notice if it had not.

Models carry several features each, for every compilation takes seconds. That a feature matters is
shown with the same checkpoint evaluated as if the feature were not there: by the oracle's own code
in the original's order, which is compiled in no time. If the port left the feature out, it would
compute just that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.synthetic import make_checkpoint
from harness.measure.oracle import stored
from harness.subjects.torch import TorchSubject
from harness.subjects.torch import load as load_torch

Conform = Callable[..., Any]
Made = Callable[[Callable[..., Any]], str]
Array = np.ndarray


def assert_complete(axes: Any) -> None:
    for name, axis in axes.items():
        assert axis["compared"] == axis["expected"] > 0, name
        assert not axis["skipped"], name


MODELS: dict[str, dict[str, Any]] = {
    # A width of 45, heads of 9, a vocabulary that is prime.
    "odd sizes": {
        "d_model": 45,
        "n_heads": 5,
        "expansion_ratio": 3,
        "vocab_size": 101,
        "logit_scale": 0.5,
        "attn": {"alibi_bias_max": 16},
    },
    "biases, many queries": {
        "n_heads": 3,
        "expansion_ratio": 2,
        "no_bias": False,
        "norm_type": "layernorm",
        "logit_scale": "inv_sqrt_d_model",
        "attn": {"attn_type": "multiquery_attention", "softmax_scale": 0.5},
    },
    "grouped queries": {
        "n_heads": 12,
        "norm_type": "rmsnorm",
        "tie_word_embeddings": False,
        "attn": {
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 4,
            "qk_ln": True,
            "clip_qkv": 0.7,
        },
    },
    "learned positions": {
        "embedding_fraction": 0.7,
        "learned_pos_emb": True,
        "attn": {"alibi": False, "clip_qkv": 1.5},
    },
    "no positions": {
        "n_heads": 1,
        "n_layers": 1,
        "learned_pos_emb": False,
        "norm_type": "low_precision_rmsnorm",
        "no_bias": False,
        "attn": {"alibi": False, "qk_ln": True},
    },
    "seven heads": {"d_model": 49, "n_heads": 7, "n_layers": 1},
}


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, config_of: Callable[..., dict[str, Any]]
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            raw = config_of(**MODELS[name])
            target = tmp_path_factory.mktemp(name.replace(" ", "-").replace(",", ""))
            made[name] = make_checkpoint(target, raw, seed=3, dtype="bfloat16", shards=2)
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_the_port_conforms(
    conform: Conform, models: Callable[[str], Path], ids: Path, name: str
) -> None:
    run = conform("check", models(name), "--prompts", ids)
    assert run.code == 0, (run.out, run.report["first_divergence"], run.diverging)
    assert_complete(run.report["compared"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_oracle_conforms_in_the_other_precisions(
    conform: Conform, models: Callable[[str], Path], ids: Path, name: str, dtype: str
) -> None:
    run = conform(
        *("check", models(name), "--prompts", ids, "--subject", "torch", "--dtype", dtype)
    )
    assert run.code == 0, (run.out, run.report["first_divergence"], run.diverging)


class Changed(TorchSubject):
    """The oracle on the same weights under another config."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        change: Callable[[dict[str, Any]], None],
        weights: Callable[[str, Array, Any], Array] = lambda name, array, read: array,
    ) -> None:
        from copy import deepcopy

        from harness.checkpoint.reader import Checkpoint
        from reference.model import Reference

        super().__init__(checkpoint, dtype)
        opened = Checkpoint.open(checkpoint)
        raw = deepcopy(opened.config)
        change(raw)
        read = stored(opened.read, dtype)
        self._model = Reference(raw, lambda n: weights(n, read(n), read), storage=dtype)  # type: ignore[arg-type]


def drop(*path: str, to: Any = None) -> Callable[[dict[str, Any]], None]:
    """Sets one field, as a port does that takes a default for it."""

    def change(raw: dict[str, Any]) -> None:
        section = raw
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = to

    return change


def without_positions(raw: dict[str, Any]) -> None:
    """No bias, and no table in its place: the checkpoint has none."""
    raw["attn_config"]["alibi"] = raw["learned_pos_emb"] = False


# Feature -> model, the change that leaves it out, and the tap that shows it first.
LEFT_OUT: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "alibi": ("seven heads", without_positions, "alibi"),
    "alibi_bias_max": ("odd sizes", drop("attn_config", "alibi_bias_max", to=8), "alibi"),
    "logit_scale": ("odd sizes", drop("logit_scale"), "logits"),
    "logit_scale in words": ("biases, many queries", drop("logit_scale"), "logits"),
    "biases": ("biases, many queries", drop("no_bias", to=True), "norm_1"),
    "softmax_scale": (
        "biases, many queries",
        drop("attn_config", "softmax_scale"),
        "attn.context",
    ),
    "rmsnorm": ("grouped queries", drop("norm_type", to="layernorm"), "norm_1"),
    "clip_qkv": ("grouped queries", drop("attn_config", "clip_qkv"), "attn.Wqkv"),
    "clip_qkv without alibi": ("learned positions", drop("attn_config", "clip_qkv"), "attn.Wqkv"),
    "untied head": ("grouped queries", drop("tie_word_embeddings", to=True), "logits"),
    "epsilon": ("grouped queries", drop("layer_norm_epsilon", to=1e-6), "norm_1"),
}


def made_without(change: Callable[[dict[str, Any]], None]) -> Callable[..., TorchSubject]:
    def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
        return Changed(checkpoint, dtype, change)

    return load


@pytest.mark.parametrize("feature", LEFT_OUT)
def test_a_feature_left_out_diverges_where_it_belongs(
    conform: Conform, models: Callable[[str], Path], ids: Path, made: Made, feature: str
) -> None:
    model, change, tap = LEFT_OUT[feature]
    subject = made(made_without(change))
    run = conform("check", models(model), "--prompts", ids, "--subject", subject)
    assert run.code == 1, run.out + run.err
    assert run.first["tap"].endswith(tap), run.first
    assert run.first["layer"] in (0, None)


def test_qk_ln_left_out_is_a_tap_that_is_missing(
    conform: Conform, models: Callable[[str], Path], ids: Path, made: Made
) -> None:
    """Its tensors are there, the norms are not run; whoever pretends to have run them is caught."""
    change = drop("attn_config", "qk_ln", to=False)
    silent = conform(
        *("check", models("grouped queries"), "--prompts", ids),
        *("--subject", made(made_without(change))),
    )
    assert silent.code == 1
    assert "promised taps are missing: attn.q_ln, attn.k_ln" in silent.first["reason"]

    def pretending(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
        subject = Changed(checkpoint, dtype, change)
        plain = subject.block

        def block(layer: int, hidden: Array) -> dict[str, Array]:
            taps = plain(layer, hidden)
            q, k = taps["attn.Wqkv"][..., :48], taps["attn.Wqkv"][..., 48 : 48 + 16]
            return taps | {"attn.q_ln": q, "attn.k_ln": k}

        subject.block = block  # type: ignore[method-assign]
        return subject

    run = conform(
        "check", models("grouped queries"), "--prompts", ids, "--subject", made(pretending)
    )
    assert run.code == 1
    assert run.first["tap"] == "transformer.blocks.0.attn.q_ln"


def swap_keys_and_values(name: str, array: Array, read: Any) -> Array:
    if not name.endswith("attn.Wqkv.weight") and not name.endswith("attn.Wqkv.bias"):
        return array
    width = 48
    narrow = (array.shape[0] - width) // 2
    q, k, v = array[:width], array[width : width + narrow], array[width + narrow :]
    return np.concatenate([q, v, k])


def deal_heads_round(name: str, array: Array, read: Any) -> Array:
    """Heads 0, 1, 2, ... ask key heads 0, 1, 2, 3, 0, ... instead of 0, 0, 0, 1, 1, ..."""
    if not name.endswith("attn.Wqkv.weight"):
        return array
    heads, kv_heads, width = 12, 4, 48
    q, k, v = np.split(array, [width, width + width // 3])
    narrow = (x.reshape(kv_heads, -1, width) for x in (k, v))
    k, v = (x[np.arange(heads) % kv_heads].reshape(width, width) for x in narrow)
    return np.concatenate([q, k, v])


@pytest.mark.parametrize("model", ["biases, many queries", "grouped queries"])
def test_shared_heads_in_the_wrong_order_diverge(
    conform: Conform, models: Callable[[str], Path], ids: Path, made: Made, model: str
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
        return Changed(checkpoint, dtype, lambda raw: None, swap_keys_and_values)

    run = conform("check", models(model), "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["tap"] == "transformer.blocks.0.attn.Wqkv"


def test_grouped_heads_dealt_round_instead_of_in_blocks_diverge(
    conform: Conform,
    config_of: Callable[..., dict[str, Any]],
    tmp_path: Path,
    ids: Path,
    made: Made,
) -> None:
    """The fused projection is right; only which head asks which key is not."""
    raw = config_of(n_heads=12, attn={"attn_type": "grouped_query_attention", "kv_n_heads": 4})
    checkpoint = make_checkpoint(tmp_path / "grouped", raw, seed=4, dtype="bfloat16")

    def all_heads(raw: dict[str, Any]) -> None:
        raw["attn_config"]["attn_type"] = "multihead_attention"
        del raw["attn_config"]["kv_n_heads"]

    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        subject = Changed(checkpoint, dtype, all_heads, deal_heads_round)
        plain, honest = subject.block, load_torch(checkpoint, dtype=dtype, target=target)

        def block(layer: int, hidden: Array) -> dict[str, Array]:
            # Its first four key heads are the checkpoint's, in order.
            taps = plain(layer, hidden)
            fused = taps["attn.Wqkv"]
            kept = [fused[..., :48], fused[..., 48:64], fused[..., 96:112]]
            return taps | {"attn.Wqkv": np.concatenate(kept, axis=-1)}

        subject.block = block  # type: ignore[method-assign]
        subject.attention_bias = honest.attention_bias  # type: ignore[method-assign]
        return subject

    run = conform("check", checkpoint, "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["tap"] == "transformer.blocks.0.attn.context"
    # Heads 0 and 5 ask the right keys either way; the worst head is not one of them.
    assert run.first["head"] not in (0, 5)


def test_learned_positions_left_out_diverge(
    conform: Conform, models: Callable[[str], Path], ids: Path, made: Made
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
        def zero(name: str, array: Array, read: Any) -> Array:
            return array * (name != "transformer.wpe.weight")

        return Changed(checkpoint, dtype, lambda raw: None, zero)

    run = conform("check", models("learned positions"), "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert run.first["tap"] == "transformer.wpe"


def test_a_fraction_that_scales_the_embedding_is_caught_in_the_deployed_path(
    conform: Conform, models: Callable[[str], Path], ids: Path, made: Made
) -> None:
    """In inference ``f x + (1 - f) x`` is x. No tap shows the mixture: ``forward`` has to."""

    def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
        subject = load_torch(checkpoint, dtype=dtype, target=target)

        def forward(input_ids: Array, lengths: Any = None) -> Array:
            hidden = 0.7 * sum(subject.embed(input_ids)[f"transformer.w{k}e"] for k in "tp")
            for layer in range(2):
                hidden = subject.block(layer, hidden)["output"]
            return subject.head(hidden)["logits"]

        subject.forward = forward  # type: ignore[method-assign]
        return subject

    run = conform("check", models("learned positions"), "--prompts", ids, "--subject", made(load))
    assert run.code == 1
    assert (run.first["tap"], run.first["mode"]) == ("logits", "deployed")
    assert {tap["mode"] for tap in run.diverging} == {"deployed"}


@pytest.mark.parametrize(
    "model", ["odd sizes", "biases, many queries", "grouped queries", "seven heads"]
)
def test_slopes_that_are_not_interleaved_diverge_for_every_odd_number_of_heads(
    conform: Conform, models: Callable[[str], Path], ids: Path, model: str
) -> None:
    run = conform("check", models(model), "--prompts", ids, "--fault", "alibi-no-interleave")
    assert run.code == 1
    assert run.first["tap"] == "alibi"
