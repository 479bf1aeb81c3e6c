"""What has no tap of its own: the stream into block 0, seen in the deployed logits only.

The taps of the embedding are its tables. How a port joins them shows where deployed logits leave
the chain of the taps; the template is the golden's answer to the stream that the fault makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.diagnose.exhibit import Exhibit
from harness.diagnose.match import Scene, Template
from harness.diagnose.steps import HEALTHY, library_steps
from harness.diagnose.weights import Read, healthy_parameters
from harness.judge.factors import Factors
from harness.judge.verdict import judge
from harness.measure.compare import measure_tap
from harness.measure.oracle import Oracle, flat
from harness.measure.records import Measurement
from harness.measure.run import Case
from harness.measure.statistics import Float, noise_scale
from harness.measure.taps import Place, embed_widths
from harness.subjects.calls import call_array

LOGITS = Place(None, "logits")


def _logits(oracle: Oracle, order: Any, hidden: Any) -> Any:
    for layer in range(oracle.config.n_layers):
        hidden = oracle.part(layer).chain(order, hidden)["output"]
    return oracle.part("head").chain(order, hidden)["logits"]


def logits_of(oracle: Oracle, order: Any, case: Case) -> Any:
    """Return the logits of one case by one order of evaluation, as a tensor."""
    import torch

    ids = torch.from_numpy(np.array(case.ids)).to(oracle.device)
    return _logits(oracle, order, oracle.part("embed").embed(order, ids)["hidden"])


def scene_around(
    oracle: Oracle, case: Case, scene: Scene, factors: Factors
) -> Callable[[Template], Scene]:
    """Return what makes the scene of a model with a fault, judged by its own orders.

    Parameters
    ----------
    scene
        Of the model without one.
    factors
        The verdict's.
    """
    shape = (*case.ids.shape, oracle.config.vocab_size)

    def around(template: Template) -> Scene:
        assert template.orders is not None
        orders, expected = template.orders(), template.expected

        def ratio(seen: Float, golden: Float) -> float:
            measured = measure_tap(
                "deployed", LOGITS, case.name, seen.reshape(shape), golden, list(orders),
                oracle.storage,
            )  # fmt: skip
            return judge(measured, oracle.storage, factors).ratio

        noise = noise_scale(expected, orders, oracle.storage)
        return replace(
            scene,
            orders=tuple(scene.golden + (order - expected) for order in orders),
            noise=lambda _: noise,
            ratio=ratio,
            around=None,
        )

    return around


def deployed_exhibit(oracle: Oracle, subject: Any, case: Case) -> Exhibit:
    """Return the deployed logits of one case.

    Raises
    ------
    SubjectFailure
        If the subject fails.
    """
    import torch

    ids = torch.from_numpy(np.array(case.ids)).to(oracle.device)
    embedding = oracle.part("embed")
    golden, *orders = (
        flat(_logits(oracle, order, embedding.embed(order, ids)["hidden"]))
        for order in (oracle.golden, *oracle.orders)
    )
    shape = (*case.ids.shape, oracle.config.vocab_size)
    logits = call_array("forward", subject.forward, (case.ids,), shape)

    def measure(seen: Float, expected: Float) -> Measurement:
        moved = [order + (expected - golden) for order in orders]
        return measure_tap(
            "deployed", LOGITS, case.name, seen.reshape(shape), expected, moved, oracle.storage
        )

    noise = noise_scale(golden, orders, oracle.storage)
    return Exhibit(
        "embed", None, "logits", {"ids": case.ids}, flat(logits), golden, tuple(orders),
        lambda expected: noise, measure,
    )  # fmt: skip


def deployed_templates(
    oracle: Oracle, case: Case, golden: Float, config: Any, read: Read
) -> Iterator[Template]:
    """Yield the logits that come of every way of joining the tables wrongly.

    Parameters
    ----------
    golden
        The deployed logits as they should be.
    config
        Parsed by the port's room.
    """
    from harness.faults.library import library

    steps = library_steps("embed", "hidden", config, "float32")
    tables = library_steps("embed", "transformer.wte", config, "float32").reads()
    names: Sequence[str] = [name for name in tables if name != "ids"]
    if config.has_wpe:
        names = [*names, "transformer.wpe.weight"]
    weights = healthy_parameters(config, "", tuple(names), read, oracle.storage)
    values = {"ids": case.ids, **weights}
    for tap in embed_widths(config):
        healthy = library_steps("embed", tap, config, "float32").run(HEALTHY, values)
        values = {**values, tap: healthy}
    for fault in library().values():
        if fault.equivalent or not steps.differs(fault.name):
            continue
        hidden = oracle.tensor(steps.run(fault.name, values))
        expected = flat(_logits(oracle, oracle.golden, hidden))
        if not np.array_equal(expected, golden):
            yield Template(fault.name, expected)
