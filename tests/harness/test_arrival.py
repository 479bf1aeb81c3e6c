"""Did every tensor arrive? By name element by element, without one by content."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.measure.arrival import Arrival, prove_arrival

Array = np.ndarray


def tensors(seed: int = 0, dtype: object = np.float16) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    shapes = {"wte": (9, 6), "norm": (6,), "square": (6, 6), "up": (24, 6)}
    return {name: generator.standard_normal(s).astype(dtype) for name, s in shapes.items()}


def arrived(held: dict[str, Array], sent: dict[str, Array] | None = None) -> dict[str, bool]:
    sent = tensors() if sent is None else sent
    result = prove_arrival(sent, sent.__getitem__, held)
    assert [a.tensor for a in result] == list(sent)
    return {a.tensor: a.arrived for a in result}


def without(name: str) -> dict[str, bool]:
    return {tensor: tensor != name for tensor in tensors()}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_tensors_under_their_own_names_arrive(dtype: object) -> None:
    sent = tensors(dtype=dtype)
    assert all(arrived(dict(sent), sent).values())
    # Wider storage holds the same values.
    assert all(arrived({k: v.astype(np.float64) for k, v in sent.items()}, sent).values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_tensors_under_other_names_are_found_by_content(dtype: object) -> None:
    sent = tensors(dtype=dtype)
    held = {f"params.{i}": array.T for i, array in enumerate(sent.values())}
    assert all(arrived(held, sent).values())


def the(name: str, held: dict[str, Array], sent: dict[str, Array] | None = None) -> Arrival:
    sent = tensors() if sent is None else sent
    return next(a for a in prove_arrival(sent, sent.__getitem__, held) if a.tensor == name)


def test_packed_and_padded_content_is_recognised_and_its_places_are_not_proved() -> None:
    held = dict(tensors())
    up = held.pop("up")
    held["up (packed)"] = np.pad(up.reshape(6, 4, 6), ((0, 2), (0, 0), (0, 1)))
    assert all(arrived(held).values())
    found = the("up", held)
    assert not found.in_order
    assert "its places are not proved" in found.detail


def test_under_another_name_it_is_said_how_a_tensor_lies() -> None:
    held = dict(tensors())
    square = held.pop("square")
    for stored, detail, in_order in (
        (square, "as elsewhere", True),
        (square.T, "as elsewhere, transposed", True),
        (square[::-1], "as elsewhere, in another order: its places are not proved", False),
    ):
        found = the("square", held | {"elsewhere": stored})
        assert (found.arrived, found.detail, found.in_order) == (True, detail, in_order)


def test_the_strongest_proof_is_taken_first() -> None:
    """Two tensors of the same numbers: each is found as it is, whichever is asked for first."""
    matrix = tensors()["square"]
    for first, second in ((matrix, matrix.T), (matrix.T, matrix)):
        sent = {"a": first, "b": second}
        result = prove_arrival(sent, sent.__getitem__, {"x": matrix.copy(), "y": matrix.T.copy()})
        assert all(a.arrived and "transposed" not in a.detail for a in result)


@pytest.mark.parametrize("name", ["wte", "norm", "square", "up"])
def test_under_its_own_name_a_permutation_is_seen(name: str) -> None:
    held = tensors()
    held[name] = np.roll(held[name], 1, axis=0)
    assert arrived(held) == without(name)


@pytest.mark.parametrize("named", [True, False], ids=["own name", "other name"])
def test_a_stale_layer_is_seen(named: bool) -> None:
    sent = {f"blocks.{i}.up": tensors(i)["up"] for i in range(3)}
    held = sent | {"blocks.2.up": sent["blocks.1.up"]}
    if not named:
        held = {f"held.{i}": array for i, array in enumerate(held.values())}
    assert arrived(held, sent) == {"blocks.0.up": True, "blocks.1.up": True, "blocks.2.up": False}


def test_parameters_are_asked_for_one_at_a_time() -> None:
    class Lazy(dict[str, Array]):
        def values(self) -> Any:
            raise AssertionError("all at once")

        items = values

    assert all(arrived(Lazy(tensors())).values())
    assert all(arrived(Lazy({f"x.{k}": v for k, v in tensors().items()})).values())


@settings(derandomize=True)
@given(name=st.sampled_from(sorted(tensors())), at=st.integers(0, 10**6), packed=st.booleans())
def test_one_changed_element_is_not_an_arrival(name: str, at: int, packed: bool) -> None:
    held = {k: v.copy() for k, v in tensors().items()}
    flat = held[name].reshape(-1)
    place = at % flat.size
    flat[place] = np.nextafter(flat[place], np.float16(np.inf))
    if packed:
        held[f"{name} (packed)"] = held.pop(name)
    assert arrived(held) == without(name)


def test_a_missing_tensor_has_not_arrived() -> None:
    held = tensors()
    del held["norm"]
    assert arrived(held) == without("norm")
    assert not any(arrived({}).values())


def test_the_square_matrix_turned_around_is_not_itself() -> None:
    held = tensors()
    held["square"] = held["square"].T
    assert arrived(held) == without("square")


def test_two_tensors_under_each_others_names_have_not_arrived() -> None:
    sent = tensors()
    sent["other"] = tensors(1)["square"]
    held = sent | {"square": sent["other"], "other": sent["square"]}
    result = arrived(held, sent)
    assert not result["square"]
    assert not result["other"]


def test_constants_in_place_of_a_norm_weight_are_noticed() -> None:
    held = tensors()
    held["norm"] = np.ones_like(held["norm"])
    (found,) = (a for a in prove_arrival(tensors(), tensors().__getitem__, held) if not a.arrived)
    assert found.detail == "6 of 6 elements differ"


def test_equal_contents_need_as_many_parameters() -> None:
    sent = {"a": np.ones(3, np.float16), "b": np.ones(3, np.float16)}
    assert arrived({"x": sent["a"], "y": sent["b"]}, sent) == {"a": True, "b": True}
    assert sum(arrived({"x": sent["a"]}, sent).values()) == 1


def test_a_shape_of_equally_many_elements_is_another_shape() -> None:
    held = tensors()
    held["up"] = held["up"].reshape(6, 24)
    result = prove_arrival(tensors(), tensors().__getitem__, held)
    assert next(a.detail for a in result if not a.arrived) == (
        "expected shape (24, 6), found (6, 24)"
    )


def test_content_of_another_dtype_under_another_name_does_not_count() -> None:
    held = dict(tensors())
    held["elsewhere"] = held.pop("norm").astype(np.float32)
    assert arrived(held) == without("norm")


def test_a_weight_that_is_no_number_never_arrives() -> None:
    sent = {"a": np.array([1, np.nan], np.float16)}
    assert arrived(dict(sent), sent) == {"a": False}
