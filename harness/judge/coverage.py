"""What was expected, what was compared, what was left out and why: per axis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Omission:
    """Items that were deliberately left out, with a reason that the report shows."""

    count: int
    reason: str


@dataclass(frozen=True)
class Axis:
    """One axis of a comparison.

    Attributes
    ----------
    name
        ``tensors``, ``layers``, ``taps``, ``cases``, ``positions``, ``dtypes`` or ``targets``.
    expected
        From config, topology and request alone.
    compared
        Counted from what was judged.
    skipped
        Reasons for the difference.
    """

    name: str
    expected: int
    compared: int
    skipped: tuple[Omission, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything expected was compared or left out for a stated reason."""
        left_out = sum(omission.count for omission in self.skipped)
        return self.expected > 0 and self.compared + left_out == self.expected

    @property
    def full(self) -> bool:
        """Whether everything expected was compared."""
        return self.expected == self.compared > 0
