"""Taps follow from the config; their widths must be those of the weights."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cases.strategies import configs
from cases.topology import tensor_shapes
from harness.measure.taps import (
    Place,
    block_widths,
    embed_widths,
    head_widths,
    places,
    shapes,
)
from reference.config import MPTConfig


@settings(derandomize=True, max_examples=60)
@given(raw=configs(max_layers=2))
def test_every_linear_or_norm_tap_is_as_wide_as_its_weight(raw: dict[str, Any]) -> None:
    config, tensors = MPTConfig.from_dict(raw), tensor_shapes(raw)
    widths = block_widths(config)
    prefix = "transformer.blocks.0."
    modules = {name.rpartition(".")[0] for name in tensors if name.startswith(prefix)}
    for module in modules:
        assert widths[module.removeprefix(prefix)] == tensors[f"{module}.weight"][0]
    # What has no weight of its own: the heads' results, two additions and GELU.
    rest = set(widths) - {module.removeprefix(prefix) for module in modules}
    assert rest == {"attn.context", "attn.residual", "ffn.act", "output"}
    assert widths["ffn.act"] == widths["ffn.up_proj"]
    for tap in ("attn.context", "attn.residual", "output"):
        assert widths[tap] == raw["d_model"]


@settings(derandomize=True, max_examples=60)
@given(raw=configs(max_layers=3), layer=st.integers(0, 2))
def test_places_are_the_parts_in_order(raw: dict[str, Any], layer: int) -> None:
    config, tensors = MPTConfig.from_dict(raw), tensor_shapes(raw)
    every = places(config)
    assert len(set(every)) == len(every)
    ends = len(embed_widths(config)) + len(head_widths(config))
    assert len(every) == ends + 1 + raw["n_layers"] * len(block_widths(config))
    assert (Place(None, "transformer.wpe") in every) == ("transformer.wpe.weight" in tensors)
    layers = [place.layer for place in every if place.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(raw["n_layers"]))
    mine = [place.tap for place in places(config, (layer,)) if place.layer is not None]
    assert mine == list(block_widths(config))


def test_a_place_is_named_as_the_module_in_the_checkpoint() -> None:
    assert Place(3, "attn.Wqkv").path == "transformer.blocks.3.attn.Wqkv"
    assert Place(None, "logits").path == "logits"


def test_shapes_are_batch_length_width() -> None:
    assert shapes({"a": 7}, 2, 3) == {"a": (2, 3, 7)}
