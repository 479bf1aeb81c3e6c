"""Widening gives what numpy gives, whatever the layout of the array."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from harness.measure.widening import WORTH, converted, widen, widened

ROWS, COLUMNS = 8, WORTH
Half = NDArray[np.float16]


def drawn(dtype: type) -> Half:
    return np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(dtype)


def read_only(array: Half) -> Half:
    array.flags.writeable = False
    return array


def in_records(array: Half) -> Half:
    """Return it as a field of records of five bytes: no address but the first need be even."""
    records = np.zeros(array.shape, [("half", array.dtype), ("more", "V3")])
    records["half"] = array
    return records["half"]


LAYOUTS: dict[str, Callable[[Half], Half]] = {
    "whole": lambda array: array,
    "read-only": read_only,
    "part of rows": lambda array: array[:, 3:-5],
    "every other": lambda array: array[::2, ::2],
    "transposed": lambda array: array.T,
    "backwards": lambda array: array[::-1],
    "one row for all": lambda array: np.broadcast_to(array[:1], array.shape),
    "field of records": in_records,
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dtype: type) -> None:
    given = LAYOUTS[layout](drawn(dtype))
    assert np.array_equal(widened(given), given.astype(np.float64))
    padded = np.zeros((given.shape[0], given.shape[1] + 7), np.float32)
    widen(given, padded[:, :-7])
    assert np.array_equal(padded[:, :-7], given.astype(np.float32))
    assert not padded[:, -7:].any()


def test_bytes_in_the_other_order() -> None:
    given = drawn(np.float16)
    swapped = given.astype(given.dtype.newbyteorder())
    assert np.array_equal(widened(swapped), given.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_value(dtype: type) -> None:
    given = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(widened(given), given.astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrowing_rounds_as_numpy_does(kind: type) -> None:
    bits = np.random.default_rng(2).integers(0, 2**32, 64 * WORTH, dtype=np.uint32)
    # Every exponent, ties between two halves, what overflows, what is not finite.
    given = np.concatenate([bits.view(np.float32), np.arange(WORTH, dtype=np.float32) + 2049])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = given.astype(kind)
    found = converted(given, np.dtype(kind))
    assert found.dtype == expected.dtype
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert found[numbers].tobytes() == expected[numbers].tobytes()
