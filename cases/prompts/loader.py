"""Reading prompts, and saying where a file is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".json", ".npy", ".txt")


class PromptError(ValueError):
    """A prompt cannot be used.

    Attributes
    ----------
    file, place
        Which file (or prompt), and where in it: a line, ``[row][column]``, or nothing.
    expected, found
        The two sides of the disagreement.
    """

    def __init__(self, file: str, place: str, expected: str, found: str) -> None:
        self.file, self.place, self.expected, self.found = file, place, expected, found
        where = f"{file}: {place}" if place else file
        super().__init__(f"{where}: expected {expected}, found {found}")


@dataclass(frozen=True)
class Prompt:
    """One sequence: token ids, or text that a tokenizer makes into ids.

    Attributes
    ----------
    name
        Unique within what it was loaded with.
    ids
        Token ids, or None where only text is known.
    text
        The text, or None where only ids are known.
    """

    name: str
    ids: tuple[int, ...] | None = None
    text: str | None = None

    def encode(
        self,
        tokenizer_path: Path | None,
        *,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
    ) -> Prompt:
        """The same prompt with ids, at most the first `max_tokens` of them.

        Parameters
        ----------
        tokenizer_path
            A tokenizer.json. Needed for a prompt of text only.
        vocab_size
            Every id has to be below it.

        Raises
        ------
        PromptError
            Text without a tokenizer, text of no token, or an id outside the vocabulary.
        """
        ids = self.ids
        if ids is None:
            ids = _tokenize(self.name, self.text or "", tokenizer_path)
        for at, value in enumerate(ids):
            if vocab_size is not None and value >= vocab_size:
                raise PromptError(
                    self.name, f"[{at}]", f"an id below the vocabulary's {vocab_size}", str(value)
                )
        return Prompt(self.name, ids[:max_tokens], self.text)


def load_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Read one file, or every prompt file lying directly in a folder, in the order of their names.

    Parameters
    ----------
    path
        ``.txt``: one prompt, the whole file as UTF-8, nothing stripped. ``.json``: a list of token
        ids, or a list of equally long lists. ``.npy``: one- or two-dimensional, of an integer type.
        Several rows of one file are named ``stem.0``, ``stem.1``, ...

    Raises
    ------
    PromptError
        Missing, unreadable or of another type; a folder without prompts; two files of one name; an
        empty prompt; an id that is no integer, a bool, or negative; ragged rows.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise PromptError(str(path), "", f"files ending in {', '.join(SUFFIXES)}", "none")
    prompts = tuple(prompt for file in files for prompt in _load_file(file))
    names: set[str] = set()
    for prompt in prompts:
        if prompt.name in names:
            raise PromptError(str(path), "", "prompts of different names", f"{prompt.name} twice")
        names.add(prompt.name)
    return prompts


def _load_file(file: Path) -> tuple[Prompt, ...]:
    if file.suffix not in SUFFIXES:
        raise PromptError(str(file), "", f"a file ending in {', '.join(SUFFIXES)}", file.name)
    try:
        if file.suffix == ".npy":
            return _from_rows(file, _array_rows(file))
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise PromptError(str(file), "", "a readable file", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptError(str(file), f"line {line}", "UTF-8", error.reason) from error
    if file.suffix == ".txt":
        if not text:
            raise PromptError(str(file), "", "at least one character", "an empty file")
        return (Prompt(file.stem, text=text),)
    try:
        return _from_rows(file, json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PromptError(str(file), place, "JSON", str(error)) from error


def _array_rows(file: Path) -> Any:
    with file.open("rb") as stream:
        try:
            array = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise PromptError(str(file), "", "a .npy array", str(error)) from error
    if not isinstance(array, np.ndarray):
        raise PromptError(str(file), "", "a .npy array", "an archive of several")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        shape = f"{array.dtype} of shape {array.shape}"
        raise PromptError(str(file), "", "integers in one or two dimensions", shape)
    return array.tolist()


def _from_rows(file: Path, raw: Any) -> tuple[Prompt, ...]:
    if not isinstance(raw, list):
        raise PromptError(str(file), "", "a list of token ids", type(raw).__name__)
    if not any(isinstance(row, list) for row in raw):
        return (Prompt(file.stem, _ids(file, "", raw)),)
    for at, row in enumerate(raw):
        if not isinstance(row, list):
            raise PromptError(str(file), f"[{at}]", "a list, as other rows are", repr(row))
        if len(row) != len(raw[0]):
            expected = f"{len(raw[0])} ids, as many as in row 0 (ragged rows belong in own files)"
            raise PromptError(str(file), f"[{at}]", expected, str(len(row)))
    return tuple(
        Prompt(f"{file.stem}.{at}", _ids(file, f"[{at}]", row)) for at, row in enumerate(raw)
    )


def _ids(file: Path, place: str, row: list[Any]) -> tuple[int, ...]:
    if not row:
        raise PromptError(str(file), place, "at least one token id", "an empty prompt")
    for at, value in enumerate(row):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise PromptError(
                str(file), f"{place}[{at}]", "a token id (an integer, 0 or more)", repr(value)
            )
    return tuple(row)


def _tokenize(name: str, text: str, tokenizer_path: Path | None) -> tuple[int, ...]:
    if tokenizer_path is None:
        raise PromptError(
            name, "", "token ids, as the checkpoint has no tokenizer.json", "text only"
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # the library raises bare Exception
        raise PromptError(str(tokenizer_path), "", "a tokenizer.json", str(error)) from error
    ids = tuple(tokenizer.encode(text).ids)
    if not ids:
        raise PromptError(name, "", "at least one token", "text that gives none")
    return ids
