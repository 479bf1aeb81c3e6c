"""ALiBi: the rates against closed forms that share no code with them, and what a softmax sees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.alibi import bias, bias_differences, distances, slopes
from reference.config import MPTConfig
from reference.model import attend
from reference.orders import GOLDEN

# Minus the binary logarithm of each head's rate, in head order, for a bias maximum of 8.
EXPONENTS: dict[int, list[float]] = {
    1: [8],
    2: [4, 8],
    3: [4, 8, 2],
    4: [2, 4, 6, 8],
    5: [2, 4, 6, 8, 1],
    6: [2, 4, 6, 8, 1, 3],
    7: [2, 4, 6, 8, 1, 3, 5],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    16: [i / 2 for i in range(1, 17)],
    24: [i / 2 for i in range(1, 17)] + [0.25 + i / 2 for i in range(8)],
    32: [i / 4 for i in range(1, 33)],
    40: [i / 4 for i in range(1, 33)] + [0.125 + i / 4 for i in range(8)],
    64: [i / 8 for i in range(1, 65)],
}


@pytest.mark.parametrize("bias_max", [4, 8, 16])
@pytest.mark.parametrize("heads", EXPONENTS)
def test_rates_are_the_tabulated_powers_of_two(heads: int, bias_max: int) -> None:
    expected = [2.0 ** -(e * bias_max / 8) for e in EXPONENTS[heads]]
    assert slopes(heads, bias_max).tolist() == expected


def press(heads: int, bias_max: float) -> list[float]:
    """The recursion of the ALiBi paper's own code, with 8 made a variable."""
    if heads & (heads - 1) == 0:
        return [2.0 ** -(bias_max / heads * (i + 1)) for i in range(heads)]
    below = 2 ** (heads.bit_length() - 1)
    return press(below, bias_max) + press(2 * below, bias_max)[0::2][: heads - below]


@pytest.mark.parametrize("bias_max", [4, 8, 16])
@pytest.mark.parametrize("heads", range(1, 65))
def test_rates_are_those_of_the_papers_recursion(heads: int, bias_max: int) -> None:
    assert slopes(heads, bias_max).tolist() == press(heads, bias_max)


@settings(max_examples=40)
@given(st.integers(1, 130), st.integers(1, 32))
def test_rates_are_distinct_and_within_their_bounds(heads: int, bias_max: int) -> None:
    rates = slopes(heads, bias_max)
    assert rates.dtype == torch.float64
    assert rates.shape == (heads,)
    assert len(set(rates.tolist())) == heads
    assert rates.max() < 1
    assert rates.min() >= 2.0**-bias_max


def test_the_maximum_matters() -> None:
    assert not torch.equal(slopes(12, 8), slopes(12, 16))
    # Whole exponents up to 8 heads: squaring is exact.
    assert torch.equal(slopes(7, 16), slopes(7, 8) ** 2)


def test_queries_are_the_last_keys() -> None:
    assert distances(2, 4).tolist() == [[-2, -1, 0, 1], [-3, -2, -1, 0]]
    assert distances(2, 4, anchor="last_key").tolist() == [[-3, -2, -1, 0]] * 2
    table = bias(3, 8, 2, 4)
    assert torch.equal(table[2, 1], slopes(3)[2] * torch.tensor([-3.0, -2, -1, 0]))


@pytest.mark.parametrize("anchor", ["query", "last_key"])
@pytest.mark.parametrize("heads", [4, 8])
def test_every_step_along_the_keys_is_the_rate(anchor: str, heads: int) -> None:
    # Rates that are whole powers of two: every product and difference is exact.
    steps = bias_differences(bias(heads, 8, 5, 9, anchor=anchor))
    assert torch.equal(steps, slopes(heads)[:, None, None].expand(heads, 5, 8))


def test_a_constant_added_to_each_row_changes_no_step() -> None:
    table = bias(8, 8, 6, 6)
    shift = torch.arange(6, dtype=torch.float64)[:, None] * 32
    assert torch.equal(bias_differences(table + shift), bias_differences(table))
    assert not torch.equal(bias_differences(table + shift.T), bias_differences(table))
    assert not torch.equal(bias_differences(table.transpose(1, 2)), bias_differences(table))


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("heads", [1, 6, 8, 12])
def test_the_attention_decays_by_the_alibi_rate(heads: int, bias_max: int) -> None:
    keys = 16
    config = MPTConfig.from_dict(
        {
            "d_model": heads * keys,
            "n_heads": heads,
            "attn_config": {"alibi": True, "alibi_bias_max": bias_max},
        }
    )
    nothing = torch.zeros(1, keys, heads, keys)
    one_hot = torch.eye(keys)[None, :, None].expand(1, keys, heads, keys)
    context = attend(config, GOLDEN, nothing, nothing, one_hot).view(keys, heads, keys)
    rates = slopes(heads, bias_max)
    for query in range(keys):
        seen = context[query, :, : query + 1]
        assert (context[query, :, query + 1 :] == 0).all()
        steps = bias_differences(seen.log())
        # Each probability is e^bias over a common sum: exponential, division, logarithm and
        # difference each round once or twice to 2^-53 of numbers below keys * rate.
        limit = 16 * 2.0**-53 * (1 + keys)
        if query:
            assert float((steps - rates[:, None]).abs().max()) <= limit


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (4, 3), (-1, 3)])
def test_impossible_lengths_are_refused(queries: int, keys: int) -> None:
    with pytest.raises(ValueError, match="query_length"):
        distances(queries, keys)


def test_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="n_heads"):
        slopes(0)


def test_float32_rates_are_the_true_ones_rounded() -> None:
    table = bias(12, 8, 1, 2, dtype=torch.float32)
    assert table[8, 0, 0].item() == -torch.tensor(math.sqrt(0.5), dtype=torch.float32).item()
