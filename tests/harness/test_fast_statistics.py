"""The first look in float32 against the exact statistics in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.measure import fast
from harness.measure.fast import Share, screen
from harness.measure.statistics import STATISTICS, statistics, ulp

KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def exact(
    observed: np.ndarray, golden: np.ndarray, dtype: str, shares: list[Share]
) -> dict[str, float]:
    variance = ulp(golden, dtype) ** 2 / 12.0
    for row, column in shares:
        variance = variance + row[:, None] * column
    found = statistics(observed.astype(np.float64), golden, np.sqrt(variance))
    return {name: found.get(name) for name in STATISTICS} | {"worst_row": found.worst_row}


@given(
    st.integers(1, 40), st.integers(1, 600), st.integers(0, 2**32 - 1),
    st.sampled_from(list(KINDS)), st.floats(-4, 4), st.booleans(), st.sampled_from([64, 1 << 15]),
)  # fmt: skip
def test_it_is_the_exact_one_to_within_its_slack(
    rows: int, columns: int, seed: int, dtype: str, size: float, joined: bool, block: int
) -> None:
    rng = np.random.default_rng(seed)
    golden = rng.normal(size=(rows, columns)) * 10.0**size
    golden[rng.random(golden.shape) < 0.05] = 0.0
    # Rounding, and a fault here and there that is far larger.
    faults = rng.normal(size=golden.shape) * 10.0**size * (rng.random(golden.shape) < 0.01)
    observed = (golden + faults).astype(KINDS[dtype])
    shares: list[Share] = []
    if joined:
        shares = [(rng.random(rows) * 1e-6, rng.random(columns))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "BLOCK", block)
        found = screen(observed, golden, dtype, shares)
    wanted = exact(observed, golden, dtype, shares)
    if not np.isfinite(found.statistics.rms):
        # Squares beyond float32, or an observed value beyond its own dtype.
        assert not wanted["tail"] < 1e18
        assert not found.within(dict.fromkeys(STATISTICS, 1e300))
        return
    for name in STATISTICS:
        assert abs(found.statistics.get(name) - wanted[name]) <= found.slack[name], name
    rounding = {name: wanted[name] + 2 * found.slack[name] for name in STATISTICS}
    assert found.within(rounding)


def test_what_is_beyond_a_limit_is_never_proved() -> None:
    golden = np.random.default_rng(0).normal(size=(30, 64))
    observed = golden.astype(np.float16)
    wanted = exact(observed, golden, "float16", [])
    found = screen(observed, golden, "float16")
    for name in STATISTICS:
        limits = {other: np.inf for other in STATISTICS}
        assert not found.within(limits | {name: wanted[name] * 0.999999})
        assert found.within(limits | {name: wanted[name] + 2 * found.slack[name]})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 17, 29])
def test_what_is_not_finite_is_infinite_everywhere(value: float, row: int) -> None:
    golden = np.random.default_rng(0).normal(size=(30, 64))
    observed = golden.astype(np.float16)
    observed[row, 5] = value
    found = screen(observed, golden, "float16")
    assert all(found.statistics.get(name) == np.inf for name in STATISTICS)
    assert found.statistics.worst_row == row
    assert not found.within(dict.fromkeys(STATISTICS, 1e300))


def test_the_slack_is_small_where_limits_are() -> None:
    # As large as logits of a whole prompt: a first look must still be able to prove something.
    rng = np.random.default_rng(1)
    golden = rng.normal(size=(128, 1024))
    found = screen(golden.astype(np.float16), golden, "float16")
    for name in STATISTICS:
        assert found.slack[name] < max(1.0, found.statistics.get(name)), name


def test_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        screen(np.zeros((2, 2)), np.zeros((2, 2)), "float32")
