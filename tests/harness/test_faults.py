"""The library of faults: each is named once, described and anchored; where it is expected first."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cases.exposure import EXPOSURES, materialise
from harness.errors import BadInput
from harness.faults import activation, alibi, anchor, library, model
from harness.faults.model import Fault, Planted
from harness.measure.paths import CHECKS
from harness.pipeline import SHIPPED
from relax_impl.layout import PANELS, ROWS, Layout

FAULTS = tuple(library.library().values())
REAL = tuple(fault for fault in FAULTS if not fault.equivalent)
EQUIVALENT = tuple(fault for fault in FAULTS if fault.equivalent)
BLOCK_TAPS = {
    "norm_1", "attn.Wqkv", "attn.q_ln", "attn.k_ln", "attn.context", "attn.out_proj",
    "attn.residual", "norm_2", "ffn.up_proj", "ffn.act", "ffn.down_proj", "output",
}  # fmt: skip
MECHANISMS = ("operations", "config", "weights", "calls")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exposures")
    return lambda name: SHIPPED if name == "trained" else materialise(name, folder, "bfloat16")


def test_there_are_more_than_120_faults_in_every_area() -> None:
    assert len(REAL) >= 120
    assert {fault.area for fault in REAL} == set(get_args(model.Area))
    assert sum(fault.area == "decode" for fault in REAL) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_says_what_it_is(fault: Fault) -> None:
    assert fault.summary and fault.evidence
    assert sum(getattr(fault, name) is not None for name in MECHANISMS) == 1
    assert fault.exposure == "trained" or fault.exposure in EXPOSURES
    if fault.equivalent:
        assert fault.first_tap == "none"
        assert len(fault.proof) > 40
        assert fault.name.startswith("same-")
    else:
        checks = {f"{model.PATHS}{check.name}" for check in CHECKS}
        assert fault.first_tap in BLOCK_TAPS | set(model.ENDS) | {"alibi"} | checks
        assert not fault.proof


def test_at_most_three_strengths_of_one_mechanism_count() -> None:
    names = [name for strengths in library.STRENGTHS.values() for name in strengths]
    assert len(set(names)) == len(names)
    assert set(names) <= {fault.name for fault in REAL}
    assert all(2 <= len(strengths) <= 3 for strengths in library.STRENGTHS.values())


def test_summaries_are_unique() -> None:
    repeated = [text for text, n in Counter(fault.summary for fault in FAULTS).items() if n > 1]
    assert not repeated


def test_two_faults_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "FAULTS", (alibi.FAULTS[0],))
    library.library.cache_clear()
    try:
        with pytest.raises(ValueError, match=alibi.FAULTS[0].name):
            library.library()
    finally:
        library.library.cache_clear()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_anchor_holds(fault: Fault, checkpoint: Callable[[str], Path]) -> None:
    assert anchor.changes(Planted(fault), checkpoint(fault.exposure))


CONFINED = [fault for fault in FAULTS if fault.per_layer and fault.exposure == "trained"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=() if at % 10 == 0 else pytest.mark.long)
        for at, fault in enumerate(CONFINED)
    ],
)
def test_a_fault_confined_to_the_last_layer_still_changes_something(fault: Fault) -> None:
    assert anchor.changes(Planted(fault, 3), SHIPPED)


DEAD = (
    dataclasses.replace(FAULTS[0], operations=lambda operations: operations),
    dataclasses.replace(FAULTS[0], operations=None, config=lambda config: config),
    dataclasses.replace(
        FAULTS[0], operations=None, weights=lambda weight_map, config, layer: weight_map
    ),
    dataclasses.replace(FAULTS[0], operations=None, calls=lambda port: None),
)


def test_a_fault_that_the_compiler_undoes_does_not_show() -> None:
    """The graph changes and no number does: a cast to bfloat16 and back is only passed through."""
    from tvm.relax.frontend.nn import op

    def undone(operations: Any) -> Any:
        def activation(x: Any) -> Any:
            return op.astype(op.astype(operations.activation(x), "bfloat16"), x.dtype)

        return dataclasses.replace(operations, activation=activation)

    ids = np.arange(40, dtype=np.int32)[None]
    planted = Planted(dataclasses.replace(library.library()["gelu-bfloat16"], operations=undone))
    assert anchor.changes(planted, SHIPPED)
    assert not anchor.shows(planted, SHIPPED, ids)
    assert anchor.shows(Planted(library.library()["gelu-bfloat16"]), SHIPPED, ids)


@pytest.mark.parametrize("fault", DEAD, ids=MECHANISMS)
def test_the_anchor_of_a_fault_that_changes_nothing_does_not_hold(fault: Fault) -> None:
    assert not anchor.changes(Planted(fault), SHIPPED)


def test_the_anchor_sees_that_an_exposure_does_not_have_what_a_fault_ignores() -> None:
    ignored = library.library()["alibi-bias-max-ignored"]
    assert not anchor.changes(Planted(ignored), SHIPPED)


def _arrays(fault: Fault, config: Any, layer: int | None) -> set[str]:
    """Return the parameters that a weight fault gives other content."""
    from relax_impl.loader import mapping

    plain = mapping(config)
    assert fault.weights is not None
    faulty = fault.weights(plain, config, layer)
    return {
        name
        for name in plain.param_map
        if faulty.param_map[name] != plain.param_map[name]
        or faulty.map_func[name] is not plain.map_func[name]
    }


@pytest.mark.parametrize(
    "fault",
    [f for f in REAL if f.weights and f.per_layer and f.exposure == "trained"],
    ids=lambda f: f.name,
)
def test_a_weight_fault_in_one_layer_stays_there(fault: Fault) -> None:
    from harness.checkpoint.reader import Checkpoint
    from relax_impl.config import MPTConfig

    config = MPTConfig.from_dict(Checkpoint.open(SHIPPED).config)
    touched = _arrays(fault, config, 2)
    layers = {int(name.split(".")[2]) for name in touched}
    # One that exchanges layers cannot do so alone.
    assert 2 in layers and len(layers) <= 1 + ("layer" in fault.name)
    assert touched <= _arrays(fault, config, None)


@pytest.mark.parametrize("layout", [ROWS, PANELS], ids=lambda layout: layout.name)
def test_every_weight_fault_uses_each_tensor_once_and_acts_in_any_layout(
    layout: Layout, checkpoint: Callable[[str], Path]
) -> None:
    from harness.checkpoint.reader import Checkpoint
    from relax_impl.config import MPTConfig
    from relax_impl.loader import load_parameters, mapping

    for fault in REAL:
        if fault.weights is None:
            continue
        opened = Checkpoint.open(checkpoint(fault.exposure))
        config = MPTConfig.from_dict(opened.config)
        plain = mapping(config, layout)
        healthy = load_parameters(config, opened, "float16", plain).tensors
        # Raises where the map is no bijection or a shape does not fit.
        loaded = load_parameters(config, opened, "float16", fault.weights(plain, config, None))
        assert all(np.isfinite(a.astype(np.float32)).all() for a in loaded.tensors.values())
        assert any(a.tobytes() != healthy[name].tobytes() for name, a in loaded.tensors.items())


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("alibi-sign", "alibi"),
        ("alibi-sign@0", "alibi"),
        ("alibi-sign@2", "transformer.blocks.2.attn.context"),
        ("gelu-tanh", "transformer.blocks.0.ffn.act"),
        ("gelu-tanh@3", "transformer.blocks.3.ffn.act"),
        ("layers-sorted-as-text", "transformer.blocks.2.norm_1"),
        ("layers-sorted-as-text@3", "transformer.blocks.3.norm_1"),
        ("expansion-ratio-always-4", "load"),
        ("norm-f-gamma-ones", "transformer.norm_f"),
        ("same-alibi-anchor", ""),
    ],
)
def test_where_a_planted_fault_is_expected_first(text: str, place: str) -> None:
    assert library.parse(text, 4).first_place == place


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alibi-sing", "did you mean alibi-sign"),
        ("gelu-tanh@4", "no such layer"),
        ("gelu-tanh@-1", "no such layer"),
        ("layers-sorted-as-text@1", "changes nothing there"),
        ("clip-qkv-ignored@0", "cannot be confined"),
        ("norm-f-gamma-ones@0", "cannot be confined"),
        ("biases-taken-for-absent@0", "cannot be confined"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        library.parse(text, 4)
