"""Vectors of float32 lanes: storage conversion, exp and erfc, as expressions.

The coefficients are fitted when the module is imported, by interpolation in Chebyshev nodes, so
that nothing here is a quoted number; the tests measure the result against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

LANES = 16
Expr = Any


def fit(function: Callable[[float], float], low: float, high: float, degree: int) -> list[float]:
    """Coefficients, constant first, of the polynomial through the Chebyshev nodes."""
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1) * (high - low) / 2 + (high + low) / 2
    values = [function(float(x)) for x in nodes]
    series = np.polynomial.Chebyshev.fit(nodes, values, degree, domain=[low, high])
    return [float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef]


HALF_LN2 = math.log(2) / 2
EXP = fit(math.exp, -HALF_LN2, HALF_LN2, 7)
# ln 2 in two parts; the first has few enough bits that its product with an exponent is exact.
LN2_HIGH = float(np.float32(round(math.log(2) * 2**15) / 2**15))
LN2_LOW = math.log(2) - LN2_HIGH
EXP_MIN = -87.0
LOWEST = float(np.finfo(np.float32).min)

# erfc(t) = u exp(P(u) - t^2) with u = 1 / (1 + t / 2): one smooth function for all t up to T_MAX,
# where erfc is already far below the smallest float32 that matters next to 1.
T_MAX = 9.0


def _erfc_core(u: float) -> float:
    t = 2 / u - 2
    return math.log(math.erfc(t) / u) + t * t


ERFC = fit(_erfc_core, 1 / (1 + T_MAX / 2), 1.0, 11)


def lanes(expr: Expr) -> int:
    """Number of lanes of an expression."""
    return int(expr.ty.dtype.lanes)


def vector(dtype: str, n: int) -> str:
    """Name of the dtype with `n` lanes."""
    return dtype if n == 1 else f"{dtype}x{n}"


def splat(value: float, n: int) -> Expr:
    """A float32 constant in all lanes."""
    return T.float32(value) if n == 1 else T.broadcast(T.float32(value), n)


def spread(value: Expr, n: int) -> Expr:
    """A scalar expression in all lanes."""
    return value if n == 1 else T.broadcast(value, n)


def at(index: Expr, n: int) -> Expr:
    """Index of `n` consecutive elements."""
    return index if n == 1 else T.ramp(index, 1, n)


def widen(value: Expr) -> Expr:
    """Storage dtype to float32."""
    return T.Cast(vector("float32", lanes(value)), value)


def narrow(value: Expr, dtype: str) -> Expr:
    """Float32 to the storage dtype, rounded to nearest even."""
    return value if dtype == "float32" else T.Cast(vector(dtype, lanes(value)), value)


def bound(name: str, value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Give a value a name within an expression.

    An expression that uses another twice holds it twice: unnamed, the polynomials below would make
    a GELU of 10,000 nodes, which every pass of the compiler walks.
    """
    variable = tirx.Var(name, vector("float32", lanes(value)))
    return tirx.Let(variable, value, body(variable))


def horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Evaluate a polynomial, constant coefficient first."""
    n = lanes(x)
    result = splat(coefficients[-1], n)
    for coefficient in reversed(coefficients[:-1]):
        result = T.fma(result, x, splat(coefficient, n))
    return result


def exp(x: Expr) -> Expr:
    """exp(x) for x <= 0 (up to 88); 0 below `EXP_MIN`; NaN stays NaN."""
    n = lanes(x)

    # The constant stands first: a comparison with NaN is false and picks the second.
    def of_clamped(x: Expr, clamped: Expr) -> Expr:
        return bound(
            "k", T.nearbyint(clamped * splat(1 / math.log(2), n)), lambda k: of_k(x, clamped, k)
        )

    def of_k(x: Expr, clamped: Expr, k: Expr) -> Expr:
        f = T.fma(k, splat(-LN2_LOW, n), T.fma(k, splat(-LN2_HIGH, n), clamped))
        return bound("f", f, lambda f: of_f(x, k, f))

    def of_f(x: Expr, k: Expr, f: Expr) -> Expr:
        exponent = T.shift_left(T.Cast(vector("int32", n), k), spread(T.int32(23), n))
        mantissa = T.reinterpret(vector("int32", n), horner(f, EXP))
        value = T.reinterpret(vector("float32", n), mantissa + exponent)
        return T.Select(x < splat(EXP_MIN, n), splat(0.0, n), value)

    return bound(
        "x",
        x,
        lambda x: bound("clamped", T.max(splat(EXP_MIN, n), x), lambda c: of_clamped(x, c)),
    )


def erfc(t: Expr) -> Expr:
    """Complementary error function of t >= 0."""
    n = lanes(t)

    def of_t(t: Expr) -> Expr:
        u = splat(1.0, n) / T.fma(t, splat(0.5, n), splat(1.0, n))
        return bound("u", u, lambda u: u * exp(horner(u, ERFC) - t * t))

    return bound("t", T.min(splat(T_MAX, n), t), of_t)


def gelu(x: Expr) -> Expr:
    """X Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, without cancellation in the tail."""
    n = lanes(x)

    def of_x(x: Expr) -> Expr:
        # Where erfc has vanished |x| need not be exact: infinity times zero would be no number.
        size = T.min(splat(T_MAX * math.sqrt(2), n), T.max(splat(0.0, n) - x, x))
        value = bound("size", size, lambda size: T.max(splat(0.0, n), x) - tail(size))
        # Minus infinity times zero is what the operators compute there.
        return T.Select(x < splat(LOWEST, n), splat(float("nan"), n), value)

    def tail(size: Expr) -> Expr:
        return size * splat(0.5, n) * erfc(size * splat(math.sqrt(0.5), n))

    return bound("x", x, of_x)
