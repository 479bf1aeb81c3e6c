"""Typed reading of one field of a config.json, and the error that names what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A config.json that describes no MPT this reference can run.

    Parameters
    ----------
    field
        Dotted path of the field, such as ``attn_config.clip_qkv``.
    expected
        What the field may hold, in words.
    found
        The value that it holds.
    hint
        What the reader can do about it, if more than correcting the value.
    """

    def __init__(self, field: str, expected: str, found: object, hint: str = "") -> None:
        self.field = field
        self.expected = expected
        self.found = found
        message = f"{field}: expected {expected}, found {found!r}"
        super().__init__(f"{message} ({hint})" if hint else message)


@dataclass(frozen=True)
class Fields:
    """One JSON object of the config and the dotted path that leads to it.

    Every reader returns the value of a field in its final type, or the default where the field is
    missing, and raises `ConfigError` otherwise. JSON has one type too few for us: ``true`` is an
    ``int`` in Python and must not pass for a number.
    """

    raw: Mapping[str, Any]
    path: str = ""

    def name(self, key: str) -> str:
        """Return the dotted path of a field of this object."""
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> Fields:
        """Return the object under `key`; an empty one if it is missing."""
        value = self.raw.get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(self.name(key), "an object of fields", value)
        return Fields(value, self.name(key))

    def boolean(self, key: str, default: bool) -> bool:
        """Return a field that is true or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(self.name(key), "true or false", value)
        return value

    def count(self, key: str, default: int) -> int:
        """Return a field that is a positive whole number."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(self.name(key), "a positive integer", value)
        return value

    def number(self, key: str, default: float) -> float:
        """Return a field that is a finite number."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(self.name(key), "a number", value)
        if not math.isfinite(value):
            raise ConfigError(self.name(key), "a finite number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a field that is a finite number, or None if it is null or missing."""
        return None if self.raw.get(key) is None else self.number(key, 0.0)

    def positive(self, key: str, default: float) -> float:
        """Return a field that is a finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise ConfigError(self.name(key), "a number above 0", value)
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """Return a field that is one of a few words, in lower case."""
        value = self.raw.get(key, default)
        if not isinstance(value, str) or value.lower() not in choices:
            raise ConfigError(self.name(key), "one of " + ", ".join(choices), value)
        return value.lower()

    def unknown(self, known: frozenset[str]) -> tuple[str, ...]:
        """Return the dotted paths of the fields that are not in `known`, in file order."""
        return tuple(self.name(key) for key in self.raw if key not in known)
