"""ALiBi read off an attention: whatever it really adds comes out, whatever was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.judge.factors import shipped
from harness.judge.verdict import judge
from harness.measure.alibi import PHASES, AttentionShape, from_diagonal, probe_bias
from harness.measure.compare import measure_bias
from reference.alibi import bias as reference_bias
from reference.alibi import slopes as reference_slopes

Array = np.ndarray
EPS = float(np.finfo(np.float64).eps)


def relative(slopes: Array, queries: int, keys: int) -> Array:
    """-slope * distance to the query's own key, 0 for later keys."""
    own = np.arange(keys - queries, keys)
    distance = np.maximum(own[:, None] - np.arange(keys)[None, :], 0)
    return -slopes[:, None, None] * distance


@dataclass
class Attention:
    """Causal attention in numpy; adds ``bias(queries, keys)`` and scales as it likes."""

    slopes: Array
    kv_heads: int
    scale: float
    shift: Callable[[int, int], Array] = field(default=lambda q, k: np.zeros((1, q, 1)))
    compute: type = np.float64
    rounds_bias: type | None = None
    returns: type = np.float64
    calls: int = 0

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        self.calls += 1
        queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
        q, k, v = (x.astype(self.compute).transpose(0, 2, 1, 3) for x in (q, k, v))
        k, v = (np.repeat(x, heads // self.kv_heads, axis=1) for x in (k, v))
        bias = relative(self.slopes, queries, keys) + self.shift(queries, keys)
        if self.rounds_bias is not None:
            bias = bias.astype(self.rounds_bias)
        scores = q @ k.swapaxes(2, 3) * self.compute(self.scale) + bias.astype(self.compute)
        later = np.arange(keys)[None, :] > np.arange(keys - queries, keys)[:, None]
        scores = np.where(later, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights @ v / weights.sum(-1, keepdims=True)
        return context.transpose(0, 2, 1, 3).astype(self.returns)


def bound(slopes: Array, keys: int) -> float:
    """How far a float64 measurement may lie from the truth.

    With M the largest bias every lifted score is below 2 M + 8: it takes 4 roundings of numbers of
    that size, exp adds its argument's error and one rounding, the sum ``keys`` more, quotient and
    logarithm 2. Twice that, for a value is the difference of two; and a chain adds one such value
    for every window, at most one for each key.
    """
    largest = float(np.abs(slopes).max()) * keys
    one = EPS * (4 * (2 * largest + 8) + keys + 3 + 2 * largest)
    return 2 * keys * one


LENGTHS = [(1, 1), (1, 2), (2, 2), (1, 512), (5, 512), (40, 40), (3, 257)]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (12, 12), (6, 2), (5, 1)])
def test_alibi_slopes_are_recovered(queries: int, keys: int, heads: int, kv_heads: int) -> None:
    slopes = reference_slopes(heads, 8).numpy()
    attention = Attention(slopes, kv_heads, 0.25)
    shape = AttentionShape(heads, kv_heads, 16, 0.25, "float32")
    found = probe_bias(attention, shape, slopes, queries, keys)
    expected = relative(slopes, queries, keys)
    assert found.shape == (heads, queries, keys)
    assert np.abs(found - expected).max() <= bound(slopes, keys)
    assert attention.calls > 0


@settings(derandomize=True, max_examples=40)
@given(
    truth=st.lists(st.floats(-0.5, 0.9), min_size=2, max_size=2),
    guess=st.lists(st.floats(0, 0.7), min_size=2, max_size=2),
    head_dim=st.sampled_from([1, 3, 16, 80]),
    keys=st.integers(1, 400),
    nominal=st.floats(0.05, 1),
    factor=st.floats(0.6, 1.6),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_alibi_of_any_slope_survives_a_wrong_guess_and_a_wrong_scale(
    truth: list[float],
    guess: list[float],
    head_dim: int,
    keys: int,
    nominal: float,
    factor: float,
    dtype: str,
) -> None:
    """The guess only serves to cancel: nothing of it may be left in what is measured.

    Leftovers stay below (0.9 + 0.6 * 0.7) * 400 nats, where exp is still a normal float64.
    """
    slopes, expected = np.array(truth), np.array(guess)
    attention = Attention(slopes, 1, nominal * factor)
    shape = AttentionShape(2, 1, head_dim, nominal, dtype)
    queries = min(3, keys)
    found = probe_bias(attention, shape, expected, queries, keys)
    # Rounding the guess to bfloat16 moves it by less than 1 in 256.
    largest = np.maximum(np.abs(slopes), 1.01 * factor * expected)
    assert np.abs(found - relative(slopes, queries, keys)).max() <= bound(largest, keys)


@pytest.mark.parametrize("keys", [1, 2, 3, 17, 64, 255, 256, 257, 511, 512, 1000, 1500])
def test_alibi_in_decoding_starts_from_the_last_key(keys: int) -> None:
    slopes = reference_slopes(12, 8).numpy()
    shape = AttentionShape(12, 4, 8, 8**-0.5, "float16")
    found = probe_bias(Attention(slopes, 4, 8**-0.5), shape, slopes, 1, keys)
    assert np.abs(found - relative(slopes, 1, keys)).max() <= bound(slopes, keys)


def test_alibi_that_is_zero_in_decoding_is_measured_as_zero() -> None:
    """A bias built over the query's length is 0 for one query, and nothing fails."""
    slopes = reference_slopes(12, 8).numpy()
    shape = AttentionShape(12, 12, 8, 8**-0.5, "float32")
    found = probe_bias(Attention(0 * slopes, 12, 8**-0.5), shape, slopes, 1, 300)
    assert np.abs(found).max() <= bound(slopes, 300)


@settings(derandomize=True, max_examples=20)
@given(seed=st.integers(0, 2**20), size=st.floats(0, 50))
def test_alibi_may_be_shifted_by_any_constant_in_a_row(seed: int, size: float) -> None:
    """MPT counts from the last key, ALiBi's paper from the query: a softmax cannot tell."""
    slopes = reference_slopes(6, 8).numpy()
    offsets = size * np.random.default_rng(seed).standard_normal((6, 4, 1))
    attention = Attention(slopes, 6, 0.5, shift=lambda q, k: offsets)
    shape = AttentionShape(6, 6, 4, 0.5, "float32")
    found = probe_bias(attention, shape, slopes, 4, 90)
    largest = slopes + np.abs(offsets).max() / 90
    assert np.abs(found - relative(slopes, 4, 90)).max() <= bound(largest, 90)


def test_alibi_tables_are_compared_without_their_row_constants() -> None:
    golden = reference_bias(6, 8, 4, 30).double().numpy()
    moved = golden + np.arange(24.0).reshape(6, 4, 1)
    noisy = golden + 1e-3 * np.random.default_rng(0).standard_normal(golden.shape)
    measured = measure_bias("p", moved, golden, [noisy], "float64")
    # Six heads have slopes that are powers of two, so that nothing here rounds.
    assert measured.observed.tail == 0
    assert measured.relative == 0
    assert measured.orders[0].tail > 0


def test_the_alibi_golden_is_the_formula() -> None:
    slopes = reference_slopes(12, 8).numpy()
    golden = reference_bias(12, 8, 5, 60).double().numpy()
    assert np.abs(from_diagonal(golden) - relative(slopes, 5, 60)).max() <= 60 * EPS


def judged(attention: Attention, heads: int, keys: int, dtype: str) -> bool:
    """Whether a measured bias diverges, with plain attentions of the same storage for orders."""
    slopes = reference_slopes(heads, 8).numpy()
    shape = AttentionShape(heads, heads, 16, 0.25, dtype)
    held = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    orders = [
        probe_bias(
            Attention(slopes, heads, 0.25, compute=compute, returns=held), shape, slopes, 5, keys
        )
        for compute in (np.float32, np.float64)
    ]
    exact = Attention(slopes, heads, 0.25, returns=held)
    orders += [probe_bias(exact, shape, slopes, 5, keys, phase) for phase in PHASES]
    found = probe_bias(attention, shape, slopes, 5, keys)
    golden = reference_bias(heads, 8, 5, keys).double().numpy()
    measured = measure_bias("p", found, golden, orders, "float64")
    return judge(measured, dtype, shipped()).diverges


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("keys", [64, pytest.param(512, marks=pytest.mark.long)])
def test_alibi_in_single_precision_conforms_in_any_storage(dtype: str, keys: int) -> None:
    held = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    slopes = reference_slopes(12, 8).numpy().astype(np.float32)
    healthy = Attention(slopes, 12, 0.25, compute=np.float32, returns=held)
    assert not judged(healthy, 12, keys, dtype)


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
def test_alibi_rounded_to_half_precision_diverges(narrow: type) -> None:
    slopes = reference_slopes(12, 8).numpy()
    faulty = Attention(slopes, 12, 0.25, compute=np.float32, rounds_bias=narrow, returns=np.float16)
    assert judged(faulty, 12, 512, "float16")


@pytest.mark.parametrize("error", [1.01, pytest.param(0.99, marks=pytest.mark.long)])
def test_an_alibi_slope_off_by_a_percent_diverges(error: float) -> None:
    slopes = reference_slopes(12, 8).numpy()
    slopes[7] *= error
    faulty = Attention(slopes, 12, 0.25, compute=np.float32, returns=np.float16)
    assert judged(faulty, 12, 512, "float16")


def test_alibi_whose_probabilities_underflow_is_far_off_but_finite() -> None:
    """Slopes of 4 nats a key cannot be cancelled by a guess of 0: enormous, never NaN."""
    slopes = np.array([4.0])
    shape = AttentionShape(1, 1, 4, 0.5, "float32")
    found = probe_bias(Attention(slopes, 1, 0.5), shape, np.zeros(1), 1, 400)
    assert np.isfinite(found).all()
    assert found.min() < math.log(np.finfo(np.float64).tiny) + 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "factor", [0.25, 64.0, *(pytest.param(f, marks=pytest.mark.long) for f in (1 / 64, 4.0, 8.0))]
)
def test_a_wrong_scale_is_not_read_as_a_wrong_alibi(dtype: str, factor: float) -> None:
    """Whoever forgets the scale, applies it twice or takes another width's has a sound bias."""
    held = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    slopes = reference_slopes(12, 8).numpy()
    attention = Attention(slopes, 12, 0.25 * factor, compute=np.float32, returns=held)
    assert not judged(attention, 12, 256, dtype)


class SeeingTheFuture(Attention):
    """No causal mask: later keys take part, with a bias that grows."""

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        self.calls += 1
        queries, keys = q.shape[1], k.shape[1]
        q, k, v = (x.astype(np.float32).transpose(0, 2, 1, 3) for x in (q, k, v))
        away = np.arange(keys - queries, keys)[:, None] - np.arange(keys)[None, :]
        scores = q @ k.swapaxes(2, 3) * np.float32(self.scale)
        scores = scores - self.slopes.astype(np.float32)[:, None, None] * away.astype(np.float32)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights @ v / weights.sum(-1, keepdims=True)
        return context.transpose(0, 2, 1, 3).astype(self.returns)


def test_a_missing_mask_is_not_read_as_a_wrong_alibi() -> None:
    slopes = reference_slopes(12, 8).numpy()
    attention = SeeingTheFuture(slopes, 12, 0.25, returns=np.float16)
    assert not judged(attention, 12, 256, "float16")
    wrong = SeeingTheFuture(slopes**2, 12, 0.25, returns=np.float16)
    assert judged(wrong, 12, 256, "float16")


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_a_probe_never_leaves_the_range_of_its_dtype(dtype: str) -> None:
    """The scale of a broken attention may be anything, and the probe still comes to an end."""
    slopes = reference_slopes(12, 4).numpy()
    shape = AttentionShape(12, 12, 16, 0.25, dtype)
    for factor in (0.0, 1e-6, 1e-3, 1e6, -1.0):
        found = probe_bias(Attention(slopes, 12, 0.25 * factor), shape, slopes, 2, 512)
        assert np.isfinite(found).all()
