from __future__ import annotations

import math

import pytest

from relax_impl.alibi import alibi_slopes
from relax_impl.config import MPTConfig
from relax_impl.layout import PANELS, ROWS
from relax_impl.loader import parameter_shapes
from relax_impl.topology import topology

RELEASED = [
    ({"d_model": 4096, "n_heads": 32, "n_layers": 32}, {}, 194, 6_649_286_656),
    ({"d_model": 7168, "n_heads": 64, "n_layers": 48}, {}, 290, 29_957_200_896),
    ({"d_model": 2048, "n_heads": 16, "n_layers": 24}, {"qk_ln": True}, 194, 1_311_311_872),
]


@pytest.mark.parametrize(("top", "attn", "tensors", "parameters"), RELEASED)
def test_released_models_have_their_published_size(top, attn, tensors, parameters):
    raw = {**top, "vocab_size": 50432, "no_bias": True, "attn_config": {"alibi": True, **attn}}
    shapes = topology(MPTConfig.from_dict(raw))
    # The published count of the 1b model is of 50368 rows.
    missing = 64 * top["d_model"] if attn else 0
    assert len(shapes) == tensors
    assert sum(math.prod(s) for s in shapes.values()) == parameters + missing


@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("attn_type", ["multihead_attention", "multiquery_attention"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_modules_declare_exactly_the_topology(no_bias, attn_type, tied, norm, raw):
    attn = {"attn_type": attn_type, "qk_ln": True, "alibi": tied}
    config = MPTConfig.from_dict(
        raw(attn, no_bias=no_bias, tie_word_embeddings=tied, norm_type=norm)
    )
    shapes = topology(config)
    declared = parameter_shapes(config, ROWS)
    assert declared == shapes
    packed = parameter_shapes(config, PANELS)
    for name, shape in shapes.items():
        if len(shape) == 2:
            assert packed[name] == (math.ceil(shape[0] / 16), shape[1], 16)
        else:
            assert packed[name] == shape


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 24, 32, 40, 64])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_slopes_are_powers_of_two_with_the_exponents_of_the_paper(heads, bias_max):
    # Press et al.: the slopes of the largest power of two below, then every second one of twice it.
    below = 2 ** math.floor(math.log2(heads))
    exponents = [bias_max * i / below for i in range(1, below + 1)]
    exponents += [bias_max * i / (2 * below) for i in range(1, 2 * below + 1, 2)]
    assert alibi_slopes(heads, bias_max).tolist() == [2.0**-e for e in exponents[:heads]]
