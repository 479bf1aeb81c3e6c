"""Errors that reach a user: what happened, where, what was expected and found, and what to do."""

from __future__ import annotations

EXIT_CONFORMS = 0
EXIT_DIVERGES = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_PROVEN = 3
EXIT_INTERNAL = 70


class ConformanceError(Exception):
    """An error that is reported in one sentence, never as a traceback.

    Parameters
    ----------
    what
        What went wrong, as the start of a sentence.
    where
        File, field, tensor or option concerned.
    expected, found
        The two sides of the disagreement, where there are two.
    hint
        What the reader can do about it.
    """

    exit_code: int = EXIT_INTERNAL

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected is not None:
            text += f"; expected {self.expected}"
            if self.found is not None:
                text += f", found {self.found}"
        elif self.found is not None:
            text += f"; found {self.found}"
        if self.hint:
            text += f" ({self.hint})"
        return text


class BadInput(ConformanceError):
    """A file, option or value of the user's cannot be used."""

    exit_code = EXIT_BAD_INPUT


class NotProven(ConformanceError):
    """Nothing was compared, or less than was required; the claim is neither true nor false."""

    exit_code = EXIT_NOT_PROVEN


_MEMORY_GONE = ("can't allocate memory", "std::bad_alloc", "CUDA out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there was no memory; torch and TVM have no type for it."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY_GONE)


def out_of_memory(where: str) -> NotProven:
    """Return the error that says so: it is the machine's, and proves nothing about a subject."""
    return NotProven(
        "the memory does not suffice",
        where=where,
        hint="--stream holds one block at a time, --max-tokens makes the rest less",
    )
