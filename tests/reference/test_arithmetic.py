"""Sums in every grouping: exact on integers, within Higham's bound on the rest, and different."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.arithmetic import DTYPES, gelu, linear, product, rounded, sum_last
from reference.orders import GOLDEN, Order, Sum

SUMS = [
    Sum(kind, size, permutation)
    for kind, size in (
        ("whole", 4),
        ("split", 4),
        ("split", 3),
        ("chunks", 16),
        ("chunks", 32),
        ("tree", 8),
        ("lanes", 16),
    )
    for permutation in ("none", "reversed", "shuffled", "halves")
]
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def matrices(seed: int, n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=random), torch.randn(k, m, generator=random)


def test_every_grouping_visits_every_term_once() -> None:
    @settings(max_examples=60)
    @given(st.integers(1, 130), st.sampled_from(SUMS), st.integers(0, 2**31))
    def check(length: int, plan: Sum, seed: int) -> None:
        # Sums of 130 products below 64 are exact in float32, in any grouping.
        random = torch.Generator().manual_seed(seed)
        a = torch.randint(-8, 8, (2, 3, length), generator=random)
        b = torch.randint(-8, 8, (2, length, 4), generator=random)
        order = Order("any", sum=plan)
        assert torch.equal(product(a.float(), b.float(), order).long(), a @ b)
        assert torch.equal(sum_last(a.float(), order).long(), a.sum(-1, keepdim=True))

    check()


@pytest.mark.parametrize("plan", SUMS, ids=str)
def test_every_grouping_keeps_the_bound_of_a_dot_product(plan: Sum) -> None:
    k = 500
    a, b = matrices(0, 7, k, 5)
    exact = a.double() @ b.double()
    # Higham 2002, section 3.1: |error| <= k u / (1 - k u) |a| |b|, whatever the order of summation.
    bound = k * UNIT["float32"] / (1 - k * UNIT["float32"]) * (a.abs().double() @ b.abs().double())
    assert ((product(a, b, Order("any", sum=plan)) - exact).abs() <= bound).all()


def test_groupings_are_not_all_the_same() -> None:
    a, b = matrices(1, 16, 512, 16)
    kinds = [Sum(), Sum("split", 4), Sum("chunks", 32), Sum("tree", 64), Sum("lanes", 16)]
    results = [product(a, b, Order("any", sum=plan)) for plan in kinds]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert not torch.equal(one, other)
    plain, back = (Order("any", sum=Sum("chunks", 32, p)) for p in ("none", "reversed"))
    assert not torch.equal(product(a, b, plain), product(a, b, back))


@pytest.mark.parametrize(
    ("plan", "terms", "expected"),
    [
        # In float32, 2^24 + 1 is 2^24: which terms meet first decides what is left of the ones.
        (Sum("split", 2), [2**24, 1, -(2**24), 1], 1),
        (Sum("lanes", 2), [2**24, 1, -(2**24), 1], 2),
        (Sum("lanes", 2), [2**24, -(2**24), 1, 1], 1),
        (Sum("chunks", 1), [2**24, 1, -(2**24), 1], 1),
        (Sum("chunks", 1), [-(2**24), 1, 1, 2**24], 2),
        (Sum("chunks", 1, "reversed"), [-(2**24), 1, 1, 2**24], 0),
        (Sum("chunks", 1, "halves"), [1, 1, 2**24, -(2**24)], 2),
        (Sum("chunks", 1), [1, 1, 2**24, -(2**24)], 2),
        (Sum("tree", 1), [2**24, 1, 1, 1, -(2**24), 0, 0, 0], 2),
        (Sum("chunks", 1), [2**24, 1, 1, 1, -(2**24), 0, 0, 0], 0),
        # Four parts of two, and not three of three.
        (Sum("split", 4), [2**24, 0, 1, 1, 0, 0, -(2**24), 0], 2),
    ],
    ids=str,
)
def test_a_grouping_is_what_its_name_says(plan: Sum, terms: list[int], expected: int) -> None:
    a = torch.tensor([terms], dtype=torch.float32)
    ones = torch.ones(len(terms), 1)
    assert product(a, ones, Order("any", sum=plan)).item() == expected


def test_a_narrow_accumulator_with_step_1_is_the_naive_half_precision_loop() -> None:
    a, b = matrices(2, 3, 70, 4)
    a, b = a.half().float(), b.half().float()
    total = np.zeros((3, 4), np.float16)
    for k in range(70):
        term = np.outer(a[:, k].numpy(), b[k].numpy()).astype(np.float16)
        total = (total + term).astype(np.float16)
    found = product(a, b, Order("naive", accumulator="float16", step=1))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), total.astype(np.float32))


@pytest.mark.parametrize("accumulator", ["float16", "bfloat16"])
@pytest.mark.parametrize("plan", SUMS, ids=str)
def test_a_narrow_accumulator_shows_and_keeps_its_own_bound(accumulator: str, plan: Sum) -> None:
    k = 96
    a, b = matrices(3, 5, k, 6)
    exact = a.double() @ b.double()
    order = Order("narrow", accumulator=accumulator, step=4, sum=plan)  # type: ignore[arg-type]
    error = (product(a, b, order) - exact).abs()
    unit = UNIT[accumulator]
    # At most k / step partial results and as many totals are rounded, and a few merges.
    roundings = 2 * k
    bound = ((1 + unit) ** roundings - 1) * (a.abs().double() @ b.abs().double())
    assert (error <= bound).all()
    wide = (product(a, b, replace(order, accumulator="float32")) - exact).abs()
    assert error.norm() > 100 * wide.norm() * UNIT["float32"] / unit
    assert error.norm() > wide.norm()
    values = product(a, b, order)
    assert torch.equal(values, values.to(DTYPES[accumulator]).float())


CUT = Order("cut", accumulator="float32_cut")


@pytest.mark.parametrize(
    ("terms", "nearest", "cut"),
    [
        # The first 16 make 2**24; then 1.75 of a unit of 2 is less than one, of either sign.
        ({0: 2**24, 16: 1.75}, 2**24 + 2, 2**24),
        ({0: -(2**24), 16: -1.75}, -(2**24) - 2, -(2**24)),
        # What is added at once is added exactly.
        ({0: 2**24, 15: 1.75, 16: 0.25}, 2**24 + 2, 2**24),
        ({0: 2**24, 16: 1.75, 31: 0.25}, 2**24 + 2, 2**24 + 2),
        ({0: 2**24, 15: 1.75, 14: 0.25}, 2**24 + 2, 2**24 + 2),
        # Below a power of two the unit is half as large, and the cut goes towards zero.
        ({0: 2**24, 16: -0.25}, 2**24, 2**24 - 1),
    ],
    ids=str,
)
def test_a_sum_that_is_cut_loses_what_lies_below(
    terms: dict[int, float], nearest: float, cut: float
) -> None:
    a = torch.zeros(1, 32)
    for at, value in terms.items():
        a[0, at] = value
    ones = torch.ones(32, 1)
    assert product(a, ones, CUT).item() == cut
    assert linear(a, ones.T, None, CUT).item() == cut
    assert float(np.float32(sum(terms.values()))) == nearest


@pytest.mark.parametrize("batched", [False, True])
def test_a_sum_that_is_cut_is_the_one_of_rational_numbers(batched: bool) -> None:
    a, b = matrices(4, 3, 150, 4)
    a, b = a.half().float(), b.half().float()

    def towards_zero(value: Fraction) -> Fraction:
        nearest = np.float32(float(value))
        if abs(Fraction(float(nearest))) > abs(value):
            nearest = np.nextafter(nearest, np.float32(0))
        return Fraction(float(nearest))

    found = product(*((a[None], b[None]) if batched else (a, b)), CUT).reshape(3, 4)
    for i in range(3):
        for j in range(4):
            total = Fraction(0)
            for start in range(0, 150, 16):
                ks = range(start, min(start + 16, 150))
                total += sum(Fraction(a[i, k].item()) * Fraction(b[k, j].item()) for k in ks)
                total = towards_zero(total)
            assert found[i, j].item() == float(total)


def test_parts_of_a_sum_that_is_cut_are_added_outside_of_the_unit() -> None:
    a = torch.tensor([[2.0**24, 1.75]])
    order = replace(CUT, sum=Sum("split", 2))
    assert product(a, torch.ones(2, 1), order).item() == 2**24 + 2


def test_a_long_sum_that_is_cut_comes_out_too_small() -> None:
    a, b = matrices(5, 64, 4096, 64)
    exact = a.double() @ b.double()

    def gain(order: Order) -> float:
        return float((product(a, b, order) * exact).sum() / exact.square().sum() - 1)

    # Each of 256 cuts takes half a unit of 24 bits on average, 2^-25 to 2^-24 of what has been
    # summed up so far, which is (t / 256)^1/2 of the result.
    least, most = (256 * 2 / 3 * 2.0**-power for power in (25, 24))
    assert least < -gain(CUT) < most
    assert abs(gain(Order("plain"))) < least / 20


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("limit", "size"), [("ROWS_AT_A_TIME", 2), ("WIDENED_AT_A_TIME", 9)])
def test_a_linear_layer_in_pieces_is_the_whole_one(
    weight_dtype: torch.dtype, limit: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.arange(24.0).reshape(2, 3, 4), torch.arange(20.0).reshape(5, 4)
    bias = torch.arange(5.0)
    expected = (x.long() @ weight.long().T + bias.long()).double()
    monkeypatch.setattr(f"reference.arithmetic.{limit}", size)
    for order in (GOLDEN, Order("chunks", sum=Sum("chunks", 2))):
        wide = x.to(DTYPES[order.compute])
        found = linear(wide, weight.to(weight_dtype), bias, order)
        assert found.dtype == wide.dtype
        assert torch.equal(found.double(), expected)


def test_a_separate_epilogue_rounds_before_the_bias() -> None:
    x, weight = torch.tensor([[1.0, 2.0**-12]]), torch.tensor([[1.0, 1.0]])
    bias = torch.tensor([-1.0])
    fused = Order("fused", storage="float16")
    assert linear(x, weight, bias, fused).item() == 2.0**-12
    assert linear(x, weight, bias, replace(fused, epilogue="separate")).item() == 0.0


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_rounding_is_to_storage_and_golden_does_not_round(storage: str, compute: str) -> None:
    value = torch.tensor([1 / 3, 1e-9, 70000.0, -1e39], dtype=torch.float64).to(DTYPES[compute])
    order = Order("any", compute=compute, storage=storage)  # type: ignore[arg-type]
    assert torch.equal(rounded(value, order), value.to(DTYPES[storage]).to(value.dtype))
    assert rounded(value, GOLDEN) is value
    if storage == "float16":
        assert torch.isinf(rounded(value, order)[2])


@pytest.mark.parametrize("formula", ["torch", "half_first", "half_last"])
def test_gelu_is_the_exact_one(formula: str) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    exact = gelu(x, GOLDEN)
    single = x.float()
    found = gelu(single, Order("any", gelu=formula))  # type: ignore[arg-type]
    # |gelu'| <= 1.13 for the rounding of x; then erf (4 units in the last place, torch's vector
    # library), the sum with 1 (below 2) and two products round: 8 units of |x| are enough.
    limit = 8 * UNIT["float32"] * (x.abs() + UNIT["float32"])
    assert ((found.double() - exact).abs() <= limit).all()
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    assert not ((tanh - exact).abs() <= limit).all()


def test_golden_gelu_keeps_its_left_tail() -> None:
    # Mills' ratio: x * Phi(-x) = phi(x) * (1 - 1/x^2 + 3/x^4 - 15/x^6 ...), alternating.
    x = 10.0
    phi = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    high, low = 1 - x**-2 + 3 * x**-4, 1 - x**-2 + 3 * x**-4 - 15 * x**-6
    found = -gelu(torch.tensor(-x, dtype=torch.float64), GOLDEN).item() / phi
    assert low < found < high
