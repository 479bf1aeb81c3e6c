"""Rounding to float16 against the definition of rounding to nearest, ties to even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import rounding
from harness.checkpoint.rounding import Counts, Rounder

SIGN, INFINITY, NAN = 0x8000, 0x7C00, 0x7E00


def magnitudes() -> list[float]:
    """Value of every finite float16 magnitude by its bits, from the format's definition.

    Bits eeeee mmmmmmmmmm: m * 2^-24 for e = 0, else (1024 + m) * 2^(e - 25). One more entry is the
    value after the largest, 2^16, that rounding compares with; it means infinity.
    """
    values = [m * 2.0**-24 for m in range(1024)]
    values += [(1024 + m) * 2.0 ** (e - 25) for e in range(1, 31) for m in range(1024)]
    return [*values, 2.0**16]


MAGNITUDES = np.array(magnitudes())


def nearest_even(values: np.ndarray) -> np.ndarray:
    """Bits of the float16 nearest to each value: the two neighbours are compared in float64.

    The distances are differences of float64 with at most 53 bits: for bfloat16 and float32 values
    they are exact (Sterbenz between neighbours, and by exponent range near zero), so that a tie is
    seen as one.
    """
    size = np.abs(values)
    above = np.clip(np.searchsorted(MAGNITUDES, size), 1, len(MAGNITUDES) - 1)
    below = above - 1
    to_below, to_above = size - MAGNITUDES[below], MAGNITUDES[above] - size
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    bits = np.where(up, above, below)
    bits = np.where(np.isnan(values), NAN, bits)
    return bits | np.where(np.signbit(values), SIGN, 0)


def counted(values: np.ndarray, bits: np.ndarray) -> Counts:
    """Counts from the definition of each category, on bits."""
    size = bits & 0x7FFF
    finite = np.isfinite(values)
    overflowed = finite & (size == INFINITY)
    flushed = finite & (size == 0) & (values != 0)
    kept = finite & ~overflowed & ~flushed
    inexact = kept & (MAGNITUDES[np.minimum(size, INFINITY - 1)] != np.abs(values))
    sums = (int(np.sum(c)) for c in (overflowed, flushed, inexact, ~finite))
    return Counts(*sums)


def check(source: np.ndarray) -> None:
    out = np.empty(source.size, np.float16)
    counts = Rounder()(source, out)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the patterns
        values = source.astype(np.float64)
    bits = out.view(np.uint16)
    expected = nearest_even(values)
    nan = np.isnan(values)
    assert np.array_equal(bits[~nan], expected[~nan])
    assert np.isnan(out[nan]).all()  # the payload of a NaN is free
    assert counts == counted(values, expected)


PATTERNS = np.arange(2**16, dtype=np.uint16)


def test_every_bfloat16_by_table():
    check(PATTERNS.view(ml_dtypes.bfloat16))


def test_every_bfloat16_by_arithmetic():
    # One odd value in a block of ordinary ones, so that the arithmetic and its repair both run.
    block, ordinary = 64, np.uint16(0x3F80)
    for start in range(0, 2**16, 2**12):
        bits = np.full((2**12, block), ordinary)
        bits[:, 17] = PATTERNS[start : start + 2**12]
        check(bits.reshape(-1).view(ml_dtypes.bfloat16))


def test_both_ways_are_taken(monkeypatch):
    taken = []
    real = np.take
    monkeypatch.setattr(rounding.np, "take", lambda *a: taken.append(1) or real(*a))
    out = np.empty(256, np.float16)
    Rounder()(np.ones(256, ml_dtypes.bfloat16), out)
    assert not taken
    Rounder()(np.zeros(256, ml_dtypes.bfloat16), out)
    assert taken


def test_every_pattern_counted_once_by_hand():
    """The categories' sizes in closed form.

    bfloat16 magnitudes are ordered by their bits. Overflow: finite, at least 65536 = 0x4780, so
    0x7F80 - 0x4780. Flushed: non-zero, at most 2^-25 = 0x3300 (a tie, to even zero), so 0x3300.
    Not finite: from 0x7F80 on, 0x80. Inexact: magnitudes above 2^-25 of which a bit lies below
    2^-24; in the binade [2^(k), 2^(k+1)), k from -25 to -18, of 128 values those that are no
    multiple of 2^-24: 127 above the tie itself for k = -25, 128 - 2^(k + 24) for k from -24 on.
    Every one of both signs.
    """
    inexact = 127 + sum(128 - 2 ** (k + 24) for k in range(-24, -17))
    expected = Counts(
        overflowed=2 * (0x7F80 - 0x4780),
        flushed=2 * 0x3300,
        inexact=2 * inexact,
        not_finite=2 * 0x80,
    )
    out = np.empty(2**16, np.float16)
    assert Rounder()(PATTERNS.view(ml_dtypes.bfloat16), out) == expected


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_float32(values):
    check(np.array(values, np.float32))


def test_float32_around_every_float16_and_every_tie():
    ties = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2
    for values in (MAGNITUDES, ties):
        exact = values.astype(np.float32)
        assert np.array_equal(exact.astype(np.float64), values)
        for near in (exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.inf)):
            check(near.astype(np.float32))
            check(-near.astype(np.float32))


def test_float64_is_rounded_once():
    # Just above the tie between 1 and 1 + 2^-10: by way of float32 it would fall on it, and to 1.
    value = 1 + 2.0**-11 + 2.0**-40
    out = np.empty(1, np.float16)
    assert Rounder()(np.array([value]), out) == Counts(inexact=1)
    assert out[0] == 1 + 2.0**-10


def test_every_float16_is_copied():
    out = np.empty(2**16, np.float16)
    assert Rounder()(PATTERNS.view(np.float16), out) == Counts(not_finite=2 * 1024)
    assert np.array_equal(out.view(np.uint16), PATTERNS)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("around", [-1, 0, 1])
def test_blocks_meet(monkeypatch, dtype, around):
    monkeypatch.setattr(rounding, "_BLOCK", 32)
    check(np.linspace(-65504, 65504, 64 + around).astype(dtype))
    out = np.empty(0, np.float16)
    assert Rounder()(np.empty(0, dtype), out) == Counts()


def test_counts_add_up():
    assert Counts(1, 2, 3, 4) + Counts(10, 20, 30, 40) == Counts(11, 22, 33, 44)
    assert not Counts()
    assert Counts(not_finite=1)
