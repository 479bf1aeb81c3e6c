"""Prompt files: what is read, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
from cases.prompts import Prompt, PromptError, default_prompts, load_prompts

ROOT = Path(cases.__file__).parent
TOKENIZER = ROOT / "checkpoints" / "mpt-tiny-english" / "tokenizer.json"


def test_the_shipped_folder() -> None:
    prompts = {prompt.name: prompt for prompt in load_prompts(ROOT / "prompts")}
    assert list(prompts) == [
        "every-byte",
        "long",
        "padding-like.0",
        "padding-like.1",
        "repeated-token",
        "short",
        "vocabulary-ends",
    ]
    ids = {name: prompt.encode(TOKENIZER, vocab_size=1024).ids for name, prompt in prompts.items()}
    assert all(ids.values())
    assert 256 <= len(ids["long"] or ()) <= 320
    assert len(ids["short"] or ()) < 64
    assert {0, 1, 1022, 1023} <= set(ids["vocabulary-ends"] or ())
    assert len(set(ids["repeated-token"] or ())) == 1 < len(ids["repeated-token"] or ())
    assert (ids["padding-like.1"] or ())[:8] == (1,) * 8


def test_every_byte_holds_all_that_utf8_uses() -> None:
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set((ROOT / "prompts" / "every-byte.txt").read_bytes()) == set(range(256)) - never


def test_forms_of_one_prompt_agree(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[3, 0, 7]")
    np.save(tmp_path / "b.npy", np.array([3, 0, 7], np.uint16))
    (tmp_path / "c.json").write_text("[[3, 0, 7], [1, 1, 1]]")
    np.save(tmp_path / "d.npy", np.array([[3, 0, 7], [1, 1, 1]], np.int32))
    (tmp_path / "ignored.md").write_text("not a prompt")
    one, other = (3, 0, 7), (1, 1, 1)
    assert load_prompts(tmp_path) == (
        Prompt("a", one),
        Prompt("b", one),
        Prompt("c.0", one),
        Prompt("c.1", other),
        Prompt("d.0", one),
        Prompt("d.1", other),
    )
    assert all(
        type(value) is int for prompt in load_prompts(tmp_path) for value in prompt.ids or ()
    )


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b" a\r\n\n ")
    assert load_prompts(tmp_path / "x.txt") == (Prompt("x", text=" a\r\n\n "),)


@pytest.mark.parametrize(
    ("name", "content", "place", "found"),
    [
        ("a.json", b"[]", "", "an empty prompt"),
        ("a.json", b"[[1], []]", "[1]", "0"),
        ("a.json", b"[[], []]", "[0]", "an empty prompt"),
        ("a.json", b"[1, true]", "[1]", "True"),
        ("a.json", b"[1, 2.0]", "[1]", "2.0"),
        ("a.json", b'["1"]', "[0]", "'1'"),
        ("a.json", b"[0, -1]", "[1]", "-1"),
        ("a.json", b"[[1, 2], [3, null]]", "[1][1]", "None"),
        ("a.json", b"[[1, 2], [3]]", "[1]", "1"),
        ("a.json", b"[[1], 2]", "[1]", "2"),
        ("a.json", b"[2, [1]]", "[0]", "2"),
        ("a.json", b'{"ids": [1]}', "", "dict"),
        ("a.json", b"[1,\n2", "line 2", None),
        ("a.json", b"[" * 100_000, "", None),
        ("a.json", b"[1,\n\xff]", "line 2", "invalid start byte"),
        ("a.txt", b"", "", "an empty file"),
        ("a.txt", b"a\nb\n\x80", "line 3", "invalid start byte"),
        ("a.npy", b"no array", "", None),
        ("a.npy", b"", "", None),
        ("a.csv", b"1,2", "", "a.csv"),
    ],
)
def test_bad_files(
    tmp_path: Path, name: str, content: bytes, place: str, found: str | None
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        load_prompts(file)
    assert (caught.value.file, caught.value.place) == (str(file), place)
    assert found in (caught.value.found, None)
    assert str(file) in str(caught.value) and place in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0]),
        np.array([True]),
        np.array(3),
        np.zeros((1, 2, 3), int),
        np.zeros((0,), int),
        np.zeros((2, 0), int),
        np.array([-1]),
    ],
    ids=str,
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray) -> None:  # type: ignore[type-arg]
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(PromptError, match=r"a\.npy"):
        load_prompts(tmp_path)


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1], None], object), allow_pickle=True)
    with pytest.raises(PromptError, match=r"a \.npy array"):
        load_prompts(tmp_path)


def test_folders_without_prompts_and_doubles(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="found none"):
        load_prompts(tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PromptError, match="a twice"):
        load_prompts(tmp_path)
    with pytest.raises(PromptError, match="No such file"):
        load_prompts(tmp_path / "missing.json")


def test_encoding_needs_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="text only"):
        Prompt("t", text="x").encode(None)
    with pytest.raises(PromptError, match=r"t: \[1\]: expected an id below the vocabulary's 5"):
        Prompt("t", ids=(4, 5)).encode(None, vocab_size=5)
    with pytest.raises(PromptError, match=r"at least one token"):
        Prompt("t", text="").encode(TOKENIZER)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PromptError, match=r"a tokenizer\.json"):
        Prompt("t", text="x").encode(tmp_path / "tokenizer.json")
    assert Prompt("t", ids=(4, 5)).encode(None, max_tokens=1).ids == (4,)


@given(st.integers(1, 60_000), st.integers(1, 3000), st.integers(1, 600))
def test_default_prompts_fit_any_checkpoint(vocabulary: int, longest: int, most: int) -> None:
    prompts = default_prompts(vocabulary, longest, max_tokens=most)
    assert prompts == default_prompts(vocabulary, longest, max_tokens=most)
    ids = [prompt.ids or () for prompt in prompts]
    lengths = {len(row) for row in ids}
    limit = min(longest, most)
    assert len(set(ids)) == len({prompt.name for prompt in prompts}) == len(prompts)
    assert {1, min(2, limit), limit} <= lengths and max(lengths) == limit
    assert min(37, limit) in lengths
    assert all(0 <= value < vocabulary for row in ids for value in row)
    seen = {value for row in ids for value in row}
    assert 0 in seen or limit < 3
    assert vocabulary - 1 in seen or limit < 3
    assert any(len(set(row)) == 1 and len(row) == min(33, limit) for row in ids)


def test_default_prompts_with_a_tokenizer() -> None:
    plain = default_prompts(1024, 512)
    prompts = default_prompts(1024, 512, TOKENIZER)
    assert prompts[: len(plain)] == plain
    assert [prompt.name for prompt in prompts[len(plain) :]] == ["short", "long", "every-byte"]
    assert max(len(prompt.ids or ()) for prompt in prompts) == 512
    with pytest.raises(PromptError, match="below the vocabulary's 300"):
        default_prompts(300, 512, TOKENIZER)


def test_one_prompt_is_longer_than_the_others() -> None:
    prompts = default_prompts(1024, 512, TOKENIZER, max_tokens=40, longest=300)
    lengths = {prompt.name: len(prompt.ids or ()) for prompt in prompts}
    assert lengths.pop("full-length") == 300
    assert max(lengths.values()) == 40


@pytest.mark.parametrize(("vocabulary", "longest"), [(0, 4), (4, 0)])
def test_default_prompts_of_nothing(vocabulary: int, longest: int) -> None:
    with pytest.raises(PromptError, match="at least 1"):
        default_prompts(vocabulary, longest)


def test_json_of_default_prompts_loads_again(tmp_path: Path) -> None:
    for prompt in default_prompts(50, 20):
        (tmp_path / f"{prompt.name}.json").write_text(json.dumps(prompt.ids))
    assert {p.ids for p in load_prompts(tmp_path)} == {p.ids for p in default_prompts(50, 20)}
