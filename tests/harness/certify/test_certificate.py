"""Counting: every figure of a certificate from results made up by hand."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from harness.certify.bounds import upper_bound
from harness.certify.campaign import sampled
from harness.certify.certificate import (
    Certificate,
    Share,
    certify,
    fallen,
    layer_of,
    read_certificate,
)
from harness.certify.healthy import HEAD_DIMS, VOCABULARIES, certified_config, require_disjoint
from harness.certify.lines import cost, lines
from harness.certify.page import page
from harness.certify.planting import confined_layer, mechanism
from harness.certify.results import FaultRun, HealthyRun, Record
from harness.errors import BadInput
from harness.faults.library import library, parse
from harness.report.files import to_json

FIRST = "transformer.blocks.0.norm_1"


def fault(name: str, **changes: object) -> FaultRun:
    plain = FaultRun(
        fault=name,
        layer=None,
        area="norm",
        exposure="trained",
        equivalent=False,
        verdict="diverges",
        by_tap=True,
        lost=0,
        expected=FIRST,
        found=FIRST,
        mode="local",
        ratio=5.0,
        ratios={"local norm_1": 5.0, "deployed logits": 0.5},
        named=name,
        rules={"cosine": True, "strict": False},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def healthy(weights: str, **changes: object) -> HealthyRun:
    plain = HealthyRun(
        weights, "torch", "float16", 3, "conforms", "", 0.5, {"local norm_1": 0.5},
        {"cosine": True, "strict": False},
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def made(runs: list[FaultRun | HealthyRun], **changes: object) -> Certificate:
    fields: dict[str, object] = {
        "target": "llvm",
        "dtype": "float16",
        "factors": "f" * 64,
        "stamp": "s",
        "sample": "",
        "versions": {"python": "3"},
        "seeds": (10, 20),
    }
    return certify(runs, **(fields | changes))  # type: ignore[arg-type]


RUNS: list[FaultRun | HealthyRun] = [
    fault("a"),
    fault("b", by_tap=False, found="", mode="", lost=2, named=None),
    fault("c", verdict="conforms", by_tap=False, found="", named=None, ratio=0.5,
          ratios={"local norm_1": 0.2, "deployed logits": 0.5}),
    fault("d", area="mask", named="a", held_out="x", expected="alibi",
          found="transformer.blocks.0.attn.context", ratios={"local attn.context": 1.5}),
    fault("a", layer=1, expected="transformer.blocks.1.norm_1",
          found="transformer.blocks.2.norm_1", alike=("z",)),
    fault("same", equivalent=True, verdict="conforms", by_tap=False, found=""),
    fault("same-2", equivalent=True),
    healthy("seed 1"),
    healthy("seed 1", dtype="bfloat16", verdict="diverges", found=FIRST,
            ratios={"local norm_1": 1.25}),
    healthy("seed 2", subject="relax", inputs=2),
]  # fmt: skip


def test_kill_rates_count_the_library_once_and_by_area() -> None:
    found = made(RUNS)
    assert found.total.full == Share(3, 4)
    assert found.total.envelope_only == Share(2, 4)
    assert found.total.leave_one_out == Share(3, 4)
    assert found.kill["mask"].full == Share(1, 1)
    assert found.kill["norm"].full == Share(2, 3)
    assert found.killed == ("a", "b", "d")


def test_survivors_say_how_close_they_came() -> None:
    (survivor,) = made(RUNS).survivors
    assert survivor.fault == "c"
    assert survivor.why == "closest to a limit is deployed logits, at 50 % of it"


def test_a_check_that_failed_is_a_survivor() -> None:
    broken = fault("a", verdict="error", by_tap=False, found="", detail="TypeError: no")
    (survivor,) = made([broken]).survivors
    assert survivor.why == "the check failed: TypeError: no"


def test_false_alarms_are_counted_by_weights() -> None:
    found = made(RUNS).healthy
    assert found is not None
    assert (found.runs, found.inputs, found.clusters) == (3, 8, 2)
    assert (found.flagged, found.flagged_clusters) == (1, 1)
    assert found.upper_bound == upper_bound(1, 2)
    assert found.by_subject == {"relax": Share(0, 1), "torch": Share(1, 2)}
    assert found.alarms == (f"healthy seed 1 torch bfloat16: diverges at {FIRST}",)


@pytest.mark.parametrize("verdict", ["not-proven", "error"])
def test_a_healthy_run_that_proves_nothing_is_no_pass(verdict: str) -> None:
    found = made([fault("a"), healthy("seed 1", verdict=verdict)]).healthy
    assert found is not None
    assert found.flagged == 1


def test_equivalent_faults_are_false_alarms_and_no_kills() -> None:
    assert made(RUNS).equivalent == Share(1, 2)


def test_accuracy_is_counted_among_the_caught() -> None:
    found = made(RUNS).accuracy
    # a and d in their layer, d in another sub-module, a@1 in another layer; b was seen by no tap.
    assert found.layer == Share(2, 3)
    assert found.tap == Share(1, 3)
    assert found.named == Share(1, 4)
    assert found.named_or_alike == Share(2, 4)
    assert found.held_out == Share(3, 4)


def test_margins_go_both_ways() -> None:
    found = made(RUNS).margins
    assert found["local norm_1"].largest_healthy == 1.25
    assert found["local norm_1"].smallest_killed == 5.0
    assert found["local attn.context"].smallest_killed == 1.5
    assert found["local attn.context"].largest_healthy is None


def test_rivals_are_counted_on_the_same_runs() -> None:
    found = made(RUNS).rivals
    assert found["cosine"].killed == Share(0, 4)
    # Of three healthy runs one is of another dtype than the faults.
    assert found["cosine"].flagged == Share(0, 2)
    assert found["strict"].killed == Share(4, 4)
    assert found["strict"].flagged == Share(2, 2)


def test_nothing_is_certified_by_nothing() -> None:
    with pytest.raises(ValueError, match="no fault"):
        made([healthy("seed 1"), fault("same", equivalent=True)])


def test_the_digest_is_of_the_content() -> None:
    found = made(RUNS)
    assert read_certificate(to_json(found)) == found
    changed = to_json(found).replace(b'"target": "llvm"', b'"target": "cuda"')
    with pytest.raises(msgspec.MsgspecError, match="digest"):
        read_certificate(changed)
    assert made(RUNS, factors="e" * 64).digest != found.digest


def test_a_new_certificate_names_what_is_no_longer_caught() -> None:
    before = made(RUNS)
    now = made(
        [fault("a", verdict="conforms"), fault("c"), fault("d", area="mask")],
        factors="e" * 64,
        previous=before,
    )
    assert now.change is not None
    assert now.change.factors == f"{'f' * 64} -> {'e' * 64}"
    assert now.change.gained == ("c",)
    # b was not run this time, which is no loss.
    assert now.change.lost == ("a",)
    assert "a was caught and is not" in fallen(before, now)


def test_what_has_not_fallen_passes() -> None:
    before = made(RUNS)
    assert fallen(before, made(RUNS, previous=before)) == ()


def test_every_figure_can_fall() -> None:
    before = made([fault("a"), fault("b"), healthy("seed 1")])
    worse = made(
        [
            fault("a", found="transformer.blocks.1.norm_1", named="b", held_out="b"),
            fault("b", verdict="conforms"),
            fault("same", equivalent=True),
            healthy("seed 1", verdict="diverges"),
        ],
        previous=before,
    )
    text = "\n".join(fallen(before, worse))
    for word in ("b was caught", "false alarm", "equivalent", "norm: kill rate", "layer:", "tap:",
                 "named_or_alike:", "held_out:"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("transformer.blocks.11.ffn.act", "11"),
        ("alibi", "0"),
        ("logits", "logits"),
        ("transformer.wte", "transformer.wte"),
    ],
)
def test_layer_of_a_place(place: str, layer: str) -> None:
    assert layer_of(place) == layer


def test_words_and_page_carry_every_name() -> None:
    found = made([*RUNS, fault("<b>", area="tokens", verdict="conforms", named=None)])
    text, drawn = "\n".join(lines(found)), page(found)
    assert "<b>" in text
    assert "<b>" not in drawn
    assert html.escape("<b>") in drawn
    for word in ("survivor c", "false alarms 1 in 3", "misplaced d", "not named b"):
        assert word in text
    for name in ("mask", "cosine", "local norm_1"):
        assert name in drawn


def test_a_campaign_goes_on_from_its_record(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, "one").add(RUNS[:2])
    Record(path, "one").add(RUNS[7:])
    assert list(Record(path, "one").runs.values()) == [*RUNS[:2], *RUNS[7:]]
    # Under other factors or another port they are not results of this gate.
    assert Record(path, "two").runs == {}


def test_what_failed_to_run_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, "one").add([fault("a", verdict="error"), fault("b")])
    assert set(Record(path, "one").runs) == {"fault b"}
    Record(path, "one").add([fault("a")])
    assert set(Record(path, "one").runs) == {"fault a", "fault b"}


def test_confined_faults_lie_beyond_the_first_layer_and_inside_the_model() -> None:
    layers = {
        name: layer for name, one in library().items() if (layer := confined_layer(one)) is not None
    }
    assert len(layers) > 100
    for name, layer in layers.items():
        one = library()[name]
        assert one.per_layer and not one.equivalent
        # Where it is planted there is what it takes hold of: the command line accepts it.
        parse(f"{name}@{layer}", layer + 1)
    assert {layer for name, layer in layers.items() if library()[name].exposure == "trained"} == {
        1,
        2,
        3,
    }


def test_a_mechanism_is_held_out_whole() -> None:
    assert mechanism("gelu-tanh") == {"gelu-tanh"}
    assert "norm-epsilon-1e-3" in mechanism("norm-epsilon-1e-6")


def test_a_damaged_record_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, "one").add(RUNS[:1])
    path.write_bytes(path.read_bytes() + b"{")
    with pytest.raises(BadInput, match=r"record\.jsonl:2"):
        Record(path, "one")


def test_a_sample_has_every_area() -> None:
    names = tuple(library())
    areas = {fault.area for fault in library().values()}
    for every in (7, 40, len(names)):
        chosen = sampled(names, every)
        assert {library()[name].area for name in chosen} == areas
        assert len(chosen) <= len(names) / every + len(areas) + 1


def test_seeds_of_the_calibration_are_refused() -> None:
    require_disjoint(range(64, 70), [[0, 40], [50, 64]])
    for seeds in (range(39, 41), range(60, 61), range(0, 100)):
        with pytest.raises(BadInput, match="prove nothing"):
            require_disjoint(seeds, [[0, 40], [50, 64]])


def test_certified_configs_are_none_of_the_calibration() -> None:
    from harness.calibrate import random_config

    drawn = [random_config(np.random.default_rng(seed)) for seed in range(200)]
    assert not {raw["vocab_size"] for raw in drawn} & set(VOCABULARIES)
    assert not {raw["d_model"] // raw["n_heads"] for raw in drawn} & set(HEAD_DIMS)
    certified = [certified_config(np.random.default_rng(seed)) for seed in range(50)]
    assert not any(raw in drawn for raw in certified)


def test_a_campaign_says_what_it_cost():
    runs = [
        fault("a", seconds=2.0), fault("a", layer=1, seconds=3.5), fault("b", seconds=4.4),
        healthy("seed 1", seconds=7.0),
    ]  # fmt: skip
    assert (
        cost(runs) == "2 faults in every layer 6 s, 1 faults in one layer 4 s, 1 healthy runs 7 s"
    )
    assert cost(runs[:1]) == "1 faults in every layer 2 s"
