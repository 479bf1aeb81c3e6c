"""One tap of an inquiry, ready to be matched."""

from __future__ import annotations

from harness.diagnose.exhibit import Exhibit, Witness
from harness.diagnose.inquiry import Inquiry
from harness.diagnose.match import Scene
from harness.judge.verdict import judge
from harness.measure.run import Case
from harness.measure.statistics import Float


def case_of(inquiry: Inquiry, prompt: str) -> Case:
    """Return the case of that name."""
    return next(case for case in inquiry.cases if case.name == prompt)


def witness_of(inquiry: Inquiry, prompt: str) -> Witness:
    """Return who knows the taps of a case."""
    case = case_of(inquiry, prompt)
    dumped = inquiry.dumped[prompt] if inquiry.dumped is not None else None
    return Witness(inquiry.oracle, inquiry.subject, case, dumped)


def scene_of(inquiry: Inquiry, seen: Exhibit, mode: str | None = None) -> Scene:
    """Return what a template is held against, judged as the tap was."""
    storage, factors = inquiry.oracle.storage, inquiry.factors
    mode = mode or ("alibi" if seen.part == "attend" else "local")

    def ratio(observed: Float, expected: Float) -> float:
        return judge(seen.measure(observed, expected), storage, factors).ratio

    return Scene(
        seen.observed, seen.golden, seen.orders, seen.noise, ratio,
        factors.get(mode, storage, "gain"), factors.alpha,
    )  # fmt: skip
