"""The first look in float32 against the exact statistics in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.judge.factors import shipped
from harness.judge.verdict import judge
from harness.measure import compare, fast
from harness.measure.compare import measure_tap
from harness.measure.fast import Screen, look
from harness.measure.records import Measurement
from harness.measure.statistics import (
    STATISTICS,
    Share,
    accumulation,
    noise_scale,
    relative_error,
    shares,
    statistics,
    ulp,
)
from harness.measure.taps import Place

PLACE = Place(0, "output")
KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def screen(
    observed: np.ndarray, golden: np.ndarray, dtype: str, joined: list[Share] | None = None
) -> Screen:
    return look(golden, [observed], dtype, joined or []).screens[0]


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


def tap(seed: int, dtype: str, rows: int, columns: int, fault: float) -> tuple[list, np.ndarray]:
    """Return a golden, two orders, an unrounded evaluation and a subject that errs by ``fault``."""
    rng = np.random.default_rng(seed)
    golden = rng.normal(size=(rows, columns)) * 10.0 ** rng.normal(size=(rows, 1))
    noise = 2.0**-13 * np.abs(golden).max(axis=1, keepdims=True)

    def evaluated(rounded: bool = True) -> np.ndarray:
        result = golden + rng.normal(size=golden.shape) * noise
        return (result.astype(KINDS[dtype]) if rounded else result).astype(np.float32)

    observed = (evaluated() + fault * np.float32(noise)).astype(KINDS[dtype])
    return [golden, [evaluated(), evaluated()], [evaluated(rounded=False)]], observed


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(list(KINDS)), st.integers(1, 50),
    st.integers(1, 700), st.sampled_from([0.0, 0.5, 3.0, 40.0]), st.sampled_from([64, 1 << 15]),
)  # fmt: skip
def test_bounds_hold_what_is_exact(
    seed: int, dtype: str, rows: int, columns: int, fault: float, block: int
) -> None:
    (golden, orders, wide), observed = tap(seed, dtype, rows, columns, fault)
    joined = accumulation(golden, orders, dtype, wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "BLOCK", block)
        found = look(golden, [observed, *orders], dtype, joined)
    noise = noise_scale(golden, orders, dtype, wide)
    for tensor, seen in zip([observed, *orders], found.screens, strict=True):
        wanted = statistics(tensor.astype(np.float64), golden, noise)
        for name in STATISTICS:
            assert seen.at_least().get(name) <= wanted.get(name) <= seen.at_most().get(name), name
    wanted_shares = shares(golden, noise, dtype)
    for name in ("element", "row", "column", "total"):
        has, least = getattr(wanted_shares, name), getattr(found.shares, name)
        # The exact ones are a difference from 1, and lose digits where they are small.
        assert least <= has + 1e-12, name
        assert least >= has * (1 - 1e-3) - 1e-12, name
    assert found.relative[0] == pytest.approx(
        relative_error(observed.astype(np.float64), golden), rel=1e-4
    )


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(list(KINDS)), st.sampled_from([0.0, 0.5, 3.0, 40.0])
)
def test_what_a_first_look_proves_the_exact_statistics_confirm(
    seed: int, dtype: str, fault: float
) -> None:
    (golden, orders, wide), observed = tap(seed, dtype, 60, 300, fault)

    def measured(proved: compare.Proof | None) -> Measurement:
        return measure_tap(
            "local", PLACE, "p", observed, golden, orders, dtype, unrounded=wide, proved=proved
        )

    asked: list[bool] = []

    def proved(bounds: Measurement) -> bool:
        asked.append(not judge(bounds, dtype, shipped()).diverges)
        return asked[-1]

    looked, plain = measured(proved), measured(None)
    verdicts = [judge(found, dtype, shipped()) for found in (looked, plain)]
    assert verdicts[0].diverges == verdicts[1].diverges
    # What is not proved is what the exact statistics say, and everything else is as close.
    assert len(asked) == 1
    assert asked[0] or looked == plain
    assert verdicts[0].ratio == pytest.approx(verdicts[1].ratio, rel=1e-2)
    assert asked[0] == (not verdicts[1].diverges), "nothing here is as close as the bounds are wide"
