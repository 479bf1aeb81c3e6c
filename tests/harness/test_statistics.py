"""Statistics in units of expected noise: correct rounding is about 1, and each fault shows."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.calibrate import ALPHA
from harness.judge.limits import floor
from harness.measure.statistics import (
    LARGEST,
    STATISTICS,
    noise_scale,
    relative_error,
    row_noise,
    statistics,
    ulp,
)

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INTEGERS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}
DTYPES = sorted(TYPES)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(TYPES[dtype]).astype(np.float64)


def draw(seed: int, rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, columns))


def scores(observed: np.ndarray, golden: np.ndarray, noise: np.ndarray) -> dict[str, float]:
    """Each statistic over what chance alone reaches."""
    found = statistics(observed, golden, noise)
    return {name: found.get(name) / floor(name, *golden.shape, ALPHA) for name in STATISTICS}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_spacing_is_the_distance_to_the_next_number(dtype: str) -> None:
    """Against the formats' own bits: every 16-bit number, and a sample of the 32-bit ones."""
    integer = INTEGERS[dtype]
    bits = np.arange(2**15) if integer is np.uint16 else np.arange(0, 2**31, 65_521)
    values = bits.astype(integer).view(TYPES[dtype])
    following = (bits + 1).astype(integer).view(TYPES[dtype])
    # float64 holds both and their difference exactly; the last finite number has no successor.
    with np.errstate(invalid="ignore"):  # NaN with a payload
        pairs = values.astype(np.float64), following.astype(np.float64)
    finite = np.isfinite(pairs[0]) & np.isfinite(pairs[1])
    low, high = (pair[finite] for pair in pairs)
    assert np.array_equal(ulp(low, dtype), high - low)
    assert np.array_equal(ulp(-low, dtype), high - low)
    assert low.size > 30_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_spacing_holds_between_the_numbers_of_the_format(dtype: str) -> None:
    """A golden is float64 and lies between two numbers: theirs is the spacing."""
    low = rounded(np.abs(draw(0, 50, 50)), dtype)
    assert np.array_equal(ulp(low + 0.4 * ulp(low, dtype), dtype), ulp(low, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_is_the_formats_own(dtype: str) -> None:
    assert LARGEST[dtype] == float(ml_dtypes.finfo(TYPES[dtype]).max)


@settings(derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    exponent=st.integers(-6, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_correct_rounding_stays_under_every_floor(
    seed: int, rows: int, columns: int, exponent: int, dtype: str
) -> None:
    golden = draw(seed, rows, columns, 2.0**exponent)
    found = scores(rounded(golden, dtype), golden, noise_scale(golden, (), dtype))
    # An exact tie is sqrt(3) units, up to the rounding of one quotient and one root in float64.
    assert max(found.values()) <= 1 + 4 * np.finfo(np.float64).eps, found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_unit_is_the_noise_of_rounding(dtype: str) -> None:
    """The mean of n squares of uniform errors is 1 with a deviation of sqrt(4/5/n)."""
    golden = draw(1, 500, 500)
    found = statistics(rounded(golden, dtype), golden, noise_scale(golden, (), dtype))
    six_deviations = 6 * math.sqrt(0.8 / golden.size)
    assert abs(found.rms**2 - 1) < six_deviations


def one_element(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    error = np.zeros_like(golden)
    error[3, 5] = 10 * noise[3, 5]
    return error


def one_row(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    error = np.zeros_like(golden)
    error[7] = 10 * noise[7] * np.resize([1, -1], golden.shape[1])
    return error


def one_column(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return one_row(golden.T, noise.T).T


def row_offset(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    error = np.zeros_like(golden)
    error[7] = 1.2 * noise[7]
    return error


def column_offset(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return row_offset(golden.T, noise.T).T


def wrong_scale(golden: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return golden * (np.median(noise / np.abs(golden)))


@pytest.mark.parametrize(
    ("fault", "sees"),
    [
        (one_element, "tail"),
        (one_row, "row"),
        (one_column, "column"),
        (row_offset, "row_bias"),
        (column_offset, "column_bias"),
        (wrong_scale, "gain"),
    ],
)
@settings(derandomize=True, max_examples=10)
@given(seed=st.integers(0, 2**20), dtype=st.sampled_from(DTYPES))
def test_each_fault_has_a_statistic_that_sees_it_best(
    fault: Callable[[np.ndarray, np.ndarray], np.ndarray], sees: str, seed: int, dtype: str
) -> None:
    golden = draw(seed, 96, 96)
    noise = noise_scale(golden, (), dtype)
    found = scores(rounded(golden, dtype) + fault(golden, noise), golden, noise)
    assert max(found, key=found.__getitem__) == sees, found
    assert found[sees] > 1


@settings(derandomize=True)
@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    row=st.integers(0, 4),
    column=st.integers(0, 6),
)
def test_what_is_not_finite_is_infinitely_wrong(bad: float, row: int, column: int) -> None:
    golden = draw(0, 5, 7)
    observed = golden.copy()
    observed[row, column] = bad
    found = statistics(observed, golden, np.ones_like(golden))
    assert all(found.get(name) == math.inf for name in STATISTICS)
    assert found.worst_row == row
    assert relative_error(observed, golden) == math.inf


def test_not_finite_on_both_sides_is_no_agreement() -> None:
    golden = np.full((2, 3), math.nan)
    assert statistics(golden, golden, np.ones((2, 3))).rms == math.inf
    golden = np.full((2, 3), math.inf)
    with np.errstate(invalid="ignore"):
        assert statistics(golden, golden, np.ones((2, 3))).rms == math.inf


def test_the_worst_row_is_the_row_of_the_error() -> None:
    golden = draw(2, 9, 40)
    noise = noise_scale(golden, (), "float16")
    assert statistics(golden + one_row(golden, noise), golden, noise).worst_row == 7


@settings(derandomize=True)
@given(seed=st.integers(0, 2**20), dtype=st.sampled_from(DTYPES))
def test_orders_only_widen_the_noise(seed: int, dtype: str) -> None:
    golden = draw(seed, 12, 20)
    alone = noise_scale(golden, (), dtype)
    assert np.array_equal(alone, np.sqrt(ulp(golden, dtype) ** 2 / 12.0))
    # What one rounding explains, rounding explains: it must not count twice.
    assert np.array_equal(noise_scale(golden, [rounded(golden, dtype)], dtype), alone)
    off = rounded(golden, dtype) + 3 * ulp(golden, dtype)
    assert (noise_scale(golden, [off], dtype) > alone).all()
    assert (noise_scale(golden, (), dtype, [off]) > alone).all()


def test_an_order_that_overflows_does_not_make_the_noise_infinite() -> None:
    golden = draw(0, 4, 6)
    off = golden.copy()
    off[1, 2] = np.inf
    noise = noise_scale(golden, [off, golden], "float16", [off])
    assert np.isfinite(noise).all()
    assert (noise > 0).all()


def test_a_noise_of_rows_follows_the_rows() -> None:
    golden = draw(0, 3, 1000)
    error = draw(1, 3, 1000) * np.array([[1.0], [10.0], [0.0]])
    noise = row_noise(golden, [golden + error])
    assert noise.shape == (3, 1000)
    expected = np.sqrt(np.square((golden + error) - golden).mean(axis=1))
    assert np.array_equal(noise[:2, 0], expected[:2])
    # Exact orders leave what float64 itself can tell.
    assert 0 < noise[2].max() <= np.finfo(np.float64).eps * max(1.0, np.abs(golden[2]).max())


def test_relative_error_is_the_quotient_of_norms() -> None:
    assert relative_error(np.array([[3.0, 5.0]]), np.array([[3.0, 4.0]])) == 1 / 5
    assert relative_error(np.zeros((1, 2)), np.zeros((1, 2))) == 0
    assert relative_error(np.ones((1, 1)), np.zeros((1, 1))) == 1
