"""The tokenizer of a checkpoint: text to ids, ids to a stream of text, and where to stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.strict_json import read_object
from harness.errors import BadInput


class Text:
    """A checkpoint's tokenizer.

    Parameters
    ----------
    directory
        Holds ``tokenizer.json``, and maybe ``tokenizer_config.json`` and
        ``generation_config.json``.
    config
        The checkpoint's parsed config.json.

    Attributes
    ----------
    stops
        Ids that end a text.

    Raises
    ------
    BadInput
        If there is no tokenizer, or it cannot be read.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BadInput(
                "there is no tokenizer",
                where=str(directory),
                expected="tokenizer.json",
                hint="copy it from where the checkpoint came from",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            # The library has no type of its own for a file it cannot read.
            raise BadInput(f"not a tokenizer: {error}", where=str(path)) from error
        self.vocab_size = int(config["vocab_size"])
        self.stops = frozenset(self._stops(directory, config))

    def _stops(self, directory: Path, config: Mapping[str, Any]) -> list[int]:
        found = [config.get("eos_token_id")]
        generation = directory / "generation_config.json"
        if generation.is_file():
            found.append(read_object(generation).get("eos_token_id"))
        described = directory / "tokenizer_config.json"
        if described.is_file():
            token = read_object(described).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.append(self._tokenizer.token_to_id(token))
        flat = [one for some in found for one in (some if isinstance(some, list) else [some])]
        return [one for one in flat if isinstance(one, int) and not isinstance(one, bool)]

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt.

        Raises
        ------
        BadInput
            If it comes to no token, or to one that the model does not have.
        """
        ids = list(self._tokenizer.encode(prompt).ids)
        if not ids:
            raise BadInput("the prompt is empty", where="PROMPT", expected="at least one token")
        if max(ids) >= self.vocab_size:
            raise BadInput(
                "the tokenizer has more tokens than the model",
                where="tokenizer.json",
                expected=f"ids below {self.vocab_size}",
                found=max(ids),
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> Stream:
        """Return what turns ids into pieces of text, one at a time."""
        return Stream(self)


class Stream:
    """Pieces of text that, put together, are the text of all ids.

    A character may need several tokens: what ends in the middle of one waits.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._shown = 0
        self._settled = 0

    def push(self, token: int) -> str:
        """Return the text that a new token completes, maybe none."""
        self._ids.append(token)
        whole = self._tail()
        if whole.endswith("\ufffd"):
            return ""
        piece = whole[self._shown :]
        self._shown = len(whole)
        if len(self._ids) - self._settled > 32:
            # Decoding all ids for every token would cost a square; one token stays as context.
            self._settled = len(self._ids) - 1
            self._shown = len(self._tail())
        return piece

    def rest(self) -> str:
        """Return what still waits when nothing more comes."""
        return self._tail()[self._shown :]

    def _tail(self) -> str:
        return self._text.decode(self._ids[self._settled :])
