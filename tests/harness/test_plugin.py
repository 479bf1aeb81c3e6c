"""Subjects of other people's: whatever goes wrong inside one is its failure, and is reported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness.subjects.protocol import Rounding
from harness.subjects.torch import load as load_torch

Conform = Callable[..., Any]
Made = Callable[[Callable[..., Any]], str]
Array = np.ndarray
Taps = dict[str, Array]
FIRST_BLOCK = "transformer.blocks.0.output"


class Changed:
    """A healthy subject of which some parts are replaced, or taken away with ``None``."""

    def __init__(self, checkpoint: Path, dtype: str, target: str) -> None:
        self.healthy = load_torch(checkpoint, dtype=dtype, target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.healthy, name)


def changing(**parts: Any) -> Callable[..., Any]:
    """A factory; each part is a value, or a function that is called with the subject first."""

    def load(checkpoint: Path, *, dtype: str, target: str) -> Changed:
        subject = Changed(checkpoint, dtype, target)
        for name, part in parts.items():
            setattr(subject, name, part.__get__(subject) if callable(part) else part)
        return subject

    return load


@pytest.fixture
def judge(conform: Conform, made: Made, checkpoint: Path, ids: Path) -> Callable[..., Any]:
    def run(factory: Callable[..., Any], *options: Any) -> Any:
        return conform("check", checkpoint, "--prompts", ids, "--subject", made(factory), *options)

    return run


def test_a_subject_that_only_wraps_another_conforms(judge: Callable[..., Any]) -> None:
    """Without this, every failure below might be the wrapper's."""
    run = judge(changing(name="mine"))
    assert run.code == 0, run.out
    assert run.report["subject"]["name"] == "mine"


def raises(self: Any, *arguments: Any) -> Any:
    raise ZeroDivisionError("deep inside")


def in_layer_1(change: Callable[[Taps], Any]) -> Callable[..., Any]:
    def block(self: Any, layer: int, hidden: Array) -> Any:
        taps = self.healthy.block(layer, hidden)
        return change(taps) if layer == 1 else taps

    return block


def without(tap: str) -> Callable[[Taps], Taps]:
    return lambda taps: {name: array for name, array in taps.items() if name != tap}


def replaced(tap: str, change: Callable[[Array], Any]) -> Callable[[Taps], Taps]:
    return lambda taps: taps | {tap: change(taps[tap])}


CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "forward raises": ({"forward": raises}, "logits", "forward: raised ZeroDivisionError"),
    "embed raises": ({"embed": raises}, "transformer.wte", "embed(): raised ZeroDivisionError"),
    "block raises": ({"block": raises}, FIRST_BLOCK, "block(0): raised ZeroDivisionError"),
    "head raises": ({"head": raises}, "logits", "head(): raised ZeroDivisionError"),
    "attention_bias raises": (
        {"attention_bias": raises},
        "alibi",
        "attention_bias(1, 64): raised ZeroDivisionError: deep inside",
    ),
    "parameters raises": ({"parameters": raises}, "load", "parameters(): raised ZeroDivisionError"),
    "a tap is missing": (
        {"block": in_layer_1(without("ffn.act"))},
        "transformer.blocks.1.output",
        "block(1): promised taps are missing: ffn.act",
    ),
    "a tap lacks the batch": (
        {"block": in_layer_1(replaced("norm_1", lambda x: x[0]))},
        "transformer.blocks.1.output",
        "block(1): norm_1 has shape (19, 48), expected (1, 19, 48)",
    ),
    "a tap is narrower": (
        {"block": in_layer_1(replaced("ffn.act", lambda x: x[..., :-1]))},
        "transformer.blocks.1.output",
        "block(1): ffn.act has shape (1, 19, 191), expected (1, 19, 192)",
    ),
    "a tap is padded": (
        {"block": in_layer_1(replaced("norm_2", lambda x: np.pad(x, ((0, 0), (0, 1), (0, 0)))))},
        "transformer.blocks.1.output",
        "block(1): norm_2 has shape (1, 20, 48), expected (1, 19, 48)",
    ),
    "a tap is of integers": (
        {"block": in_layer_1(replaced("output", lambda x: x.astype(np.int32)))},
        "transformer.blocks.1.output",
        "block(1): output has dtype int32, expected a float dtype",
    ),
    "a block returns a tuple": (
        {"block": in_layer_1(lambda taps: tuple(taps.values()))},
        "transformer.blocks.1.output",
        "block(1): returned tuple, expected a mapping of taps",
    ),
    "forward returns the last position only": (
        {"forward": lambda self, ids: self.healthy.forward(ids)[:, -1]},
        "logits",
        "forward: the result has shape (1, 97), expected (1, 19, 97)",
    ),
    "forward returns nothing": (
        {"forward": lambda self, ids: None},
        "logits",
        "forward: the result has shape (), expected (1, 19, 97)",
    ),
    "a bias of too many heads": (
        {"attention_bias": lambda self, q, k: np.zeros((7, q, k))},
        "alibi",
        "attention_bias(1, 64): has shape (7, 1, 64), expected one that broadcasts to (6, 1, 64)",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_failed_call_diverges_and_says_what_happened(
    judge: Callable[..., Any], case: str
) -> None:
    parts, tap, reason = CALLS[case]
    run = judge(changing(**parts))
    assert run.code == 1, run.out + run.err
    assert run.report["verdict"] == "diverges"
    assert (run.first["tap"], run.first["mode"]) == (tap, "call")
    assert run.first["reason"].startswith(reason)
    assert run.first["observed"] is None
    (recorded, *_) = (f for f in run.report["failures"] if f["tap"] == tap)
    assert recorded["reason"].startswith(reason)
    # The traceback is for whoever repairs it; on the terminal it would bury the verdict.
    raised = "ZeroDivisionError" in reason
    assert ("Traceback" in recorded["detail"]) == raised
    assert ("deep inside" in recorded["detail"]) == raised
    assert "Traceback" not in run.out + run.err
    assert "internal error" not in run.err
    assert reason.split(":")[0] in run.out


def test_what_still_works_is_still_judged(judge: Callable[..., Any]) -> None:
    """A head that fails is no excuse for what came before it."""
    report = judge(changing(head=raises)).report
    assert report["compared"]["layers"]["compared"] == 2
    assert [a for a in report["tensors"] if not a["arrived"]] == []
    assert any(tap["mode"] == "deployed" for tap in report["taps"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tap", ["attn.context", "output"])
def test_values_that_are_not_finite_diverge_where_they_arise(
    judge: Callable[..., Any], tap: str, bad: float
) -> None:
    def one(array: Array) -> Array:
        changed = array.copy()
        changed[0, 4, 2] = bad
        return changed

    run = judge(changing(block=in_layer_1(replaced(tap, one))))
    assert run.code == 1
    first = run.first
    assert (first["tap"], first["layer"]) == (f"transformer.blocks.1.{tap}", 1)
    assert first["token"] == 4
    assert first["observed"] is None
    assert first["reason"] == "the subject's values are not finite"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_diverge(judge: Callable[..., Any], bad: float) -> None:
    run = judge(changing(forward=lambda self, ids: self.healthy.forward(ids) * bad))
    assert run.code == 1
    assert (run.first["tap"], run.first["mode"]) == ("logits", "deployed")


def test_a_bias_of_nothing_but_nan_diverges(judge: Callable[..., Any]) -> None:
    run = judge(changing(attention_bias=lambda self, q, k: np.full((6, q, k), np.nan)))
    assert run.code == 1
    assert run.first["tap"] == "alibi"


VIOLATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "dtype": (changing(dtype="fp16"), "dtype"),
    "no dtype": (changing(dtype=None), "dtype"),
    "numpy's dtype": (changing(dtype=np.dtype("float16")), "dtype"),
    "protocol": (changing(protocol=3), "another protocol version"),
    "name": (changing(name=7), "name"),
    "rounding": (changing(rounding="float32"), "not a Rounding"),
    "nothing": (lambda checkpoint, *, dtype, target: None, "no callable `forward`"),
    "no forward": (
        lambda checkpoint, *, dtype, target: SimpleNamespace(name="x", dtype=dtype),
        "no callable `forward`",
    ),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_what_does_not_speak_the_protocol_is_bad_input(
    judge: Callable[..., Any], case: str
) -> None:
    factory, words = VIOLATIONS[case]
    run = judge(factory)
    assert run.code == 2
    assert run.record is None
    assert words in run.err
    assert "Traceback" not in run.err
    assert len(run.err.strip().splitlines()) == 1


def test_a_factory_that_raises_is_the_subjects_failure(judge: Callable[..., Any]) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        raise KeyError("transformer.wte.weight")

    run = judge(load)
    assert run.code == 1
    assert run.first["tap"] == "load"
    assert "raised KeyError: 'transformer.wte.weight'" in run.first["reason"]
    assert "Traceback" in run.report["failures"][0]["detail"]
    assert "Traceback" not in run.out + run.err
    # Nothing ran, and that is what is written down.
    for name in ("layers", "taps", "cases", "positions", "dtypes", "targets"):
        assert run.report["compared"][name]["compared"] == 0, name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:load", "no module 'no_such_module'"),
        ("json:no_such_factory", "no callable 'no_such_factory'"),
        ("json:__name__", "no callable '__name__'"),
        ("relay", "expected relax, torch, transformers, peer:NAME or package.module:factory"),
        (":load", "package.module:factory"),
        ("json:", "package.module:factory"),
    ],
)
def test_a_subject_that_cannot_be_found_is_bad_input(
    conform: Conform, checkpoint: Path, ids: Path, name: str, words: str
) -> None:
    run = conform("check", checkpoint, "--prompts", ids, "--subject", name)
    assert run.code == 2
    assert words in run.err


def test_a_module_that_fails_to_import_is_named(
    conform: Conform,
    checkpoint: Path,
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken_subject.py").write_text("1 / 0\n")
    (tmp_path / "needy_subject.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, words in (
        ("broken_subject:load", "raised ZeroDivisionError"),
        ("needy_subject:load", "no_such_library"),
    ):
        run = conform("check", checkpoint, "--prompts", ids, "--subject", name)
        assert run.code == 2
        assert words in run.err
        assert name in run.err


@pytest.mark.parametrize("option", [("--dtype", "float64"), ("--target", "no-such-target")])
def test_options_that_mean_nothing_are_bad_input(
    conform: Conform, checkpoint: Path, ids: Path, option: tuple[str, str]
) -> None:
    run = conform("check", checkpoint, "--prompts", ids, *option)
    assert run.code == 2
    assert option[1] in run.err


def test_a_fault_cannot_be_planted_in_someone_elses_subject(judge: Callable[..., Any]) -> None:
    run = judge(changing(), "--fault", "alibi-absent")
    assert run.code == 2
    assert "only be planted in the relax subject" in run.err


def other_layer_order(self: Any, ids: Array, lengths: Any = None) -> Array:
    hidden = self.healthy.embed(ids)["transformer.wte"]
    for layer in (1, 0):
        hidden = self.healthy.block(layer, hidden)["output"]
    return self.healthy.head(hidden)["logits"]


def test_a_forward_that_is_not_the_tapped_chain_is_caught(judge: Callable[..., Any]) -> None:
    """Every tap is right, and what users call is another model."""
    run = judge(changing(forward=other_layer_order))
    assert run.code == 1
    assert {(tap["tap"], tap["mode"]) for tap in run.diverging} == {
        ("logits", "deployed"),
        ("forward-chain", "deployed"),
    }


def test_taps_that_are_not_what_is_computed_are_caught(judge: Callable[..., Any]) -> None:
    """The output is the healthy one, the taps on the way are not its causes."""

    def block(self: Any, layer: int, hidden: Array) -> Taps:
        taps = self.healthy.block(layer, hidden)
        return {name: array if name == "output" else array * 0 for name, array in taps.items()}

    run = judge(changing(block=block))
    assert run.code == 1
    assert run.first["tap"] == "transformer.blocks.0.norm_1"


def test_a_block_that_ignores_its_input_is_caught(judge: Callable[..., Any]) -> None:
    def block(self: Any, layer: int, hidden: Array) -> Taps:
        return self.healthy.block(layer, np.roll(hidden, 1, axis=1))

    run = judge(changing(block=block))
    assert run.code == 1
    assert run.first["tap"] == "transformer.blocks.0.norm_1"


def test_a_weight_that_did_not_arrive_diverges_by_itself(judge: Callable[..., Any]) -> None:
    """Every number is right, yet what the subject says it holds is not the checkpoint."""

    def parameters(self: Any) -> Taps:
        held = dict(self.healthy.parameters())
        return held | {"transformer.norm_f.weight": np.ones_like(held["transformer.norm_f.weight"])}

    run = judge(changing(parameters=parameters))
    assert run.code == 1
    broken = [t["tensor"] for t in run.report["tensors"] if not t["arrived"]]
    assert broken == ["transformer.norm_f.weight"]
    assert "transformer.norm_f.weight" in run.out


def test_a_declared_rounding_stands_in_the_verdict(judge: Callable[..., Any]) -> None:
    """And decides: the original's rounding of scores is not what was declared here."""
    fields = dataclasses.asdict(Rounding(scores="float32", probabilities="float32"))
    run = judge(changing(rounding=Rounding(**fields)))
    assert run.report["subject"]["rounding"] == fields
    default = judge(changing(rounding=None)).report
    assert default["subject"]["rounding"] == dataclasses.asdict(Rounding())
    for record in (run.report, default):
        assert record["verdict"] in ("conforms", "diverges")
    limit = {
        name: next(
            tap["ratio"]
            for tap in record["taps"]
            if tap["tap"].endswith("0.attn.context") and tap["mode"] == "local"
        )
        for name, record in (("wide", run.report), ("original", default))
    }
    assert limit["wide"] > limit["original"]


def test_a_subject_in_another_precision_than_asked_is_not_proven(
    judge: Callable[..., Any], checkpoint: Path
) -> None:
    def load(checkpoint: Path, *, dtype: str, target: str) -> Any:
        return load_torch(checkpoint, dtype="float32", target=target)

    run = judge(load, "--dtype", "float16")
    assert run.code == 3
    assert run.report["compared"]["dtypes"]["compared"] == 0
    assert "dtypes" in run.report["reason"]
