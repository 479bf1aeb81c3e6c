"""Generation over the cache is what full recomputation gives; a mistake is one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import BadInput
from harness.generate.command import GenerateRequest, run
from harness.generate.run import Limits, require_room
from harness.generate.sampling import Sampling, choose, probabilities
from harness.generate.text import Text
from harness.pipeline import SHIPPED
from harness.subjects.relax import RelaxSubject

PROMPT = "It is a truth universally acknowledged, that a single man"
NEW = 200


@pytest.fixture(scope="module")
def greedy() -> Any:
    pieces: list[str] = []
    request = GenerateRequest(SHIPPED, PROMPT, NEW, ignore_stop=True)
    return run(request, pieces.append), pieces


def test_there_are_200_new_tokens(greedy: Any) -> None:
    made, _ = greedy
    assert made.new_tokens == NEW == len(made.ids) - made.prompt_tokens
    assert made.agreement is None, "nobody asked for it"


def test_a_decode_step_did_the_work_of_one_token(greedy: Any) -> None:
    made, _ = greedy
    prompt, steps = made.prompt_tokens, NEW - 1
    assert made.work["prefill"] == {
        "calls": 1, "tokens": prompt, "logits": 1, "scores": prompt * (prompt + 1) // 2,
    }  # fmt: skip
    seen = sum(prompt + step + 1 for step in range(steps))
    assert made.work["decode"] == {
        "calls": steps, "tokens": steps, "logits": steps, "scores": seen,
    }  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_nothing(chunk: int, greedy: Any) -> None:
    made, _ = greedy
    again = run(GenerateRequest(SHIPPED, PROMPT, 60, chunk=chunk, ignore_stop=True), lambda t: None)
    assert again.ids == made.ids[: made.prompt_tokens + 60]
    assert again.work["prefill"]["calls"] == -(-made.prompt_tokens // chunk)


def test_what_is_streamed_is_the_text(greedy: Any) -> None:
    made, pieces = greedy
    assert "".join(pieces) == made.text
    text = Text(SHIPPED, {"vocab_size": 1024})
    assert made.text == text.decode(made.ids[made.prompt_tokens :])
    assert sum(map(bool, pieces)) > NEW // 2


def test_characters_of_several_tokens_wait_for_their_end() -> None:
    text = Text(SHIPPED, {"vocab_size": 1024})
    ids = text.encode("naïve café – “Ωμέγα” 漢字 🙂 " * 3)
    stream = text.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.rest() == text.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    cut = text.stream()
    assert "".join(map(cut.push, ids[:-2])) + cut.rest() == text.decode(ids[:-2])


def test_a_seed_repeats_and_another_does_not() -> None:
    def ids(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        return run(GenerateRequest(SHIPPED, PROMPT, 30, sampling), lambda t: None).ids

    assert ids(1) == ids(1) != ids(2)


def test_a_stop_token_ends_the_text(monkeypatch: pytest.MonkeyPatch, greedy: Any) -> None:
    made, _ = greedy
    stop = made.ids[made.prompt_tokens + 4]
    monkeypatch.setattr(Text, "_stops", lambda *a: [stop])
    first = made.ids.index(stop, made.prompt_tokens)
    ended = run(GenerateRequest(SHIPPED, PROMPT, 30), lambda t: None)
    assert (ended.ids, ended.finish) == (made.ids[: first + 1], "stop")
    assert made.finish == "length"


def test_the_end_of_text_comes_from_the_checkpoint(tmp_path: Path) -> None:
    text = Text(SHIPPED, {"vocab_size": 1024})
    assert len(text.stops) == 1
    (tmp_path / "tokenizer.json").write_bytes((SHIPPED / "tokenizer.json").read_bytes())
    assert Text(tmp_path, {"vocab_size": 1024}).stops == frozenset()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    found = Text(tmp_path, {"vocab_size": 1024, "eos_token_id": 9}).stops
    assert found == {5, 7, 9}


def test_probabilities_are_those_of_the_definition() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1]))
    close = np.finfo(np.float64).eps * 8
    assert np.allclose(probabilities(logits, Sampling(1.0)), [0.5, 0.2, 0.2, 0.1], close, close)
    assert np.allclose(
        probabilities(logits, Sampling(0.5)), np.array([25, 4, 4, 1]) / 34, close, close
    )
    # 0.5 does not reach 0.6; the second does, and of its equals the first id is kept.
    kept = probabilities(logits, Sampling(1.0, 0.6))
    assert np.allclose(kept, [5 / 7, 2 / 7, 0, 0], close, close)
    assert np.count_nonzero(probabilities(logits, Sampling(1.0, 1e-9))) == 1


def test_draws_follow_the_probabilities() -> None:
    logits, sampling = np.log(np.array([0.6, 0.3, 0.1])), Sampling(1.0, seed=3)
    draws = sampling.generator()
    n = 4000
    counts = np.bincount([choose(logits, sampling, draws) for _ in range(n)], minlength=3)
    expected = np.array([0.6, 0.3, 0.1]) * n
    # Five standard deviations of a binomial count.
    assert (abs(counts - expected) < 5 * np.sqrt(expected * (1 - expected / n))).all()


def test_logits_that_are_no_numbers_are_not_chosen_from() -> None:
    with pytest.raises(BadInput, match="the logits are not finite"):
        choose(np.array([0.0, np.nan]), Sampling(), Sampling().generator())


def test_learned_positions_end() -> None:
    class Config:
        has_wpe, max_seq_len = True, 64

    require_room(Config, 60, 4)
    with pytest.raises(BadInput, match="at most 64, found 60 \\+ 5"):
        require_room(Config, 60, 5)


def test_alibi_goes_on_past_max_seq_len() -> None:
    made = run(GenerateRequest(SHIPPED, PROMPT * 36, 3, ignore_stop=True), lambda t: None)
    assert made.prompt_tokens > 512


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    from harness.cli import main

    monkeypatch.setattr(sys, "argv", ["mpt-conform", "generate", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_record_on_standard_output(monkeypatch: Any, capsys: Any, greedy: Any) -> None:
    words = [str(SHIPPED), PROMPT, "--max-new-tokens", "8", "--json", "-"]
    assert command(monkeypatch, *words) == 0
    written = capsys.readouterr()
    record = json.loads(written.out)
    made, _ = greedy
    assert record["ids"] == made.ids[: made.prompt_tokens + 8]
    assert record["text"] in written.err
    assert set(record["seconds"]) == {"load", "prefill", "decode"}
    assert "tokens/s" in written.err


def test_text_on_standard_output(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    words = [str(SHIPPED), PROMPT, "--max-new-tokens", "5", "--json", str(file)]
    assert command(monkeypatch, *words) == 0
    assert capsys.readouterr().out == json.loads(file.read_text())["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere", "a"], "/nowhere"),
        ([str(SHIPPED), ""], "PROMPT: the prompt is empty"),
        ([str(SHIPPED), "a", "--max-new-tokens", "0"], "--max-new-tokens: cannot be used"),
        ([str(SHIPPED), "a", "--chunk", "0"], "--chunk: cannot be used"),
        ([str(SHIPPED), "a", "--temperature", "-1"], "--temperature: cannot be used"),
        ([str(SHIPPED), "a", "--temperature", "nan"], "--temperature: cannot be used"),
        ([str(SHIPPED), "a", "--top-p", "0"], "--top-p: cannot be used"),
        ([str(SHIPPED), "a", "--top-p", "0.5"], "--top-p: has no effect on greedy generation"),
        ([str(SHIPPED), "a", "--seed", "-1"], "--seed: cannot be used"),
        ([str(SHIPPED), "a", "--target", "vax"], "--target: this is no target"),
        ([str(SHIPPED), "a", "--json", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(words: Any, message: str, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, *words) == 2
    written = capsys.readouterr()
    assert message in written.err and "Traceback" not in written.err
    assert written.out == ""


def test_limits_are_checked() -> None:
    with pytest.raises(BadInput, match="--chunk"):
        Limits(1, chunk=-1)


def test_a_checkpoint_without_tokenizer(checkpoint: Path, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, str(checkpoint), "a") == 2
    assert "there is no tokenizer; expected tokenizer.json" in capsys.readouterr().err


HIDDEN = (
    "Once upon a time there was",
    "naïve café – “Ωμέγα” 漢字 🙂",
    "x",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    PROMPT * 12,
)
"""No prompt is special: text, bytes outside of it, one token, a loop, and most of max_seq_len."""


@pytest.mark.parametrize("prompt", HIDDEN, ids=lambda prompt: prompt[:12])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_prompt_goes_on_as_recomputed_and_as_the_reference(prompt: str, dtype: str) -> None:
    request = GenerateRequest(SHIPPED, prompt, NEW, dtype=dtype, ignore_stop=True, verify=True)
    made = run(request, lambda text: None)
    found = made.agreement
    assert found is not None and found.tokens == NEW
    # The cache costs no bit: what differs from recomputation is not excused at all.
    assert found.recomputation == NEW
    assert found.holds, found.disagreements
    assert found.reference + found.near_ties["reference"] == NEW


def test_every_token_is_that_of_a_forward_of_all_before_it(greedy: Any) -> None:
    made, _ = greedy
    subject = RelaxSubject(SHIPPED, "float16", "llvm")
    for end in range(made.prompt_tokens, len(made.ids)):
        # No causality is taken for granted: what comes later is not there.
        logits = subject.forward(np.array([made.ids[:end]], np.int32))
        assert int(logits[0, -1].argmax()) == made.ids[end], end


class Fixed:
    """An oracle and a subject of given logits, (positions, vocab)."""

    def __init__(self, truth: Any, noise: float, recomputed: Any) -> None:
        self.truth, self.noise, self.recomputed = np.array(truth), noise, np.array(recomputed)

    def evaluate(self, oracle: Any, ids: Any) -> Any:
        assert ids.shape == (1, len(self.truth))
        noisy = self.truth + self.noise * np.array([1, -1, 0])
        return self.truth[None], [noisy[None], self.truth[None]]

    def forward(self, ids: Any) -> Any:
        return self.recomputed[None]


def test_what_differs_is_excused_by_the_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.generate import verify as module

    truth = [[9.0, 0, 0], [1.0, 0, 0], [1.0, 0.75, 0], [0, 1.0, 0]]
    fixed = Fixed(truth, 0.125, [[9.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    monkeypatch.setattr(module, "evaluate", fixed.evaluate)
    # Positions 1, 2 and 3 are asked; the first token of the prompt is nobody's choice.
    found = module.verify(fixed, None, [0, 0], [0, 1, 1])  # type: ignore[arg-type]
    assert (found.tokens, found.recomputation, found.reference) == (3, 3, 2)
    assert found.near_ties == {"recomputation": 0, "reference": 1}
    only = found.disagreements[0]
    assert (only.position, only.token, only.other, only.by) == (3, 1, 0, "reference")
    assert (only.gap, only.noise, only.near_tie) == (0.25, 0.125, True)
    assert found.holds
    assert found.summary.startswith("3 of 3 tokens as recomputed in full (0 near ties); 2 of 3")
    fixed.noise = 0.0625
    assert not module.verify(fixed, None, [0, 0], [0, 1, 1]).holds  # type: ignore[arg-type]
    wrong = module.verify(fixed, None, [0, 0], [0, 0, 2])  # type: ignore[arg-type]
    assert (wrong.recomputation, wrong.reference, wrong.holds) == (1, 2, False)
    assert {one.by for one in wrong.disagreements} == {"recomputation", "reference"}


def test_a_decoder_that_loses_its_bias_is_told_from_a_tie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.faults.library import parse
    from harness.subjects import relax

    def faulty(checkpoint: Path, *, dtype: str, target: str, **more: Any) -> Any:
        return RelaxSubject(checkpoint, dtype, target, parse("decode-bias-absent", 4))

    monkeypatch.setattr(relax, "load", faulty)
    words = [str(SHIPPED), PROMPT, "--max-new-tokens", "40", "--ignore-stop", "--verify"]
    assert command(monkeypatch, *words) == 1
    written = capsys.readouterr().err
    assert "of 40 tokens as recomputed in full" in written
    monkeypatch.undo()
    assert command(monkeypatch, *words) == 0


def test_what_was_drawn_cannot_be_verified(monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, str(SHIPPED), "a", "--temperature", "1", "--verify") == 2
    assert "--verify: compares the likeliest tokens" in capsys.readouterr().err
