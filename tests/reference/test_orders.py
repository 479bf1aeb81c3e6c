"""The set of orders: what was declared, and nothing else, decides where they round."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from reference.orders import (
    GOLDEN,
    ORIGINAL,
    STORAGES,
    Order,
    held_out_orders,
    legitimate_orders,
)

DECLARATIONS: list[dict[str, Any]] = [
    {},
    {"scores": "float32"},
    {"probabilities": "float32"},
    {"residual": "fused"},
    {"activation": "fused"},
    {"accumulator": "float16"},
]


@pytest.mark.parametrize("storage", STORAGES)
def test_sums_that_are_cut_stand_beside_short_ones_that_are_not(storage: Any) -> None:
    orders = legitimate_orders(storage, accumulator="float32_cut")
    cut = {o.name.removesuffix(f"-{storage}") for o in orders if o.accumulator == "float32_cut"}
    assert cut == {"plain"}
    assert {o.accumulator for o in orders} == {"float32", "float32_cut"}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("declared", DECLARATIONS, ids=str)
def test_every_order_rounds_where_it_was_declared(storage: Any, declared: dict[str, str]) -> None:
    original = {
        "scores": "storage",
        "probabilities": "storage",
        "residual": "storage",
        "activation": "storage",
        "accumulator": "float32",
    }
    for order in legitimate_orders(storage, **declared) + held_out_orders(storage, **declared):
        assert order.storage == storage
        assert {name: getattr(order, name) for name in original} == original | declared


def test_calibrated_and_held_out_are_enough_and_apart() -> None:
    calibrated, held_out = legitimate_orders("float16"), held_out_orders("float16")
    assert len(calibrated) >= 5
    assert len(held_out) >= 1
    names = [order.name for order in (GOLDEN, ORIGINAL("float16"), *calibrated, *held_out)]
    assert len(set(names)) == len(names)
    # No held-out sum, in size and permutation, decides a limit.
    assert not {order.sum for order in held_out} & {order.sum for order in calibrated}


def test_the_promised_variety_is_there() -> None:
    orders = legitimate_orders("float16")
    assert {o.sum.kind for o in orders} >= {"whole", "split", "chunks"}
    assert any(o.sum.permutation != "none" for o in orders)
    assert any(o.softmax.kind == "online" and o.softmax.block == 64 for o in orders)
    assert any(o.norm.round_normalised for o in orders)
    assert {o.norm.variance for o in orders} == {"two_pass", "one_pass"}
    assert any(o.compute == "float64" for o in orders)
    assert {o.norm.variance for o in held_out_orders("float16")} >= {"welford"}
    assert {o.softmax.block for o in held_out_orders("float16")} - {64}


def test_golden_rounds_nowhere() -> None:
    assert (GOLDEN.compute, GOLDEN.storage, GOLDEN.accumulator) == ("float64", None, "float32")


@pytest.mark.parametrize(
    "field", ["compute", "storage", "scores", "probabilities", "residual", "accumulator"]
)
def test_a_rounding_that_does_not_exist_is_refused(field: str) -> None:
    assert field in {f.name for f in fields(Order)}
    with pytest.raises(ValueError, match=rf"Order\.{field}: expected one of"):
        Order("wrong", **{field: "float8"})  # type: ignore[arg-type]


def test_orders_can_be_keys() -> None:
    orders = legitimate_orders("float16")
    assert len({*orders, *legitimate_orders("float16")}) == len(orders)
