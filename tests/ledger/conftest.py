"""Runs that were never run: what is tested here is how they are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.ledger.records import Entry, Run, Value

TAPS = ("transformer.wte", "transformer.blocks.0.norm_1", "logits")


def made_entry(number: int, **changes: Any) -> Entry:
    """The ``number``-th run; its values follow from the number, so that a mixed-up one shows."""
    fields: dict[str, Any] = {
        "id": f"20260101T000000-{number:08x}",
        "created": f"2026-01-01T00:00:00.{number:06d}+00:00",
        "commit": f"{number:040x}",
        "subject": "relax",
        "name": "relax-llvm",
        "target": "llvm",
        "dtype": "float16",
        "device": "a processor",
        "driver": "",
        "fault": "",
        "checkpoint": "ab" * 32,
        "checkpoint_path": "somewhere/tiny",
        "certificate": "",
        "factors": "f" * 64,
        "inputs": f"{number:064x}",
        "seeds": {"prompts": number},
        "tvm": "1",
        "torch": "2",
        "transformers": "3",
        "environment": {"python": "3.11", "threads": "1"},
        "verdict": "conforms",
        "reason": "",
        "seconds": 1.5,
        "reproduce": "mpt-conform check",
    }
    values = tuple(
        Value("local", tap, "of_limit", number + at / 8, at or None, "rms")
        for at, tap in enumerate(TAPS)
    )
    details = {"report": {"taps": [], "number": number}}
    return Entry(Run(**{**fields, **changes}), values, details)


@pytest.fixture
def make() -> Callable[..., Entry]:
    return made_entry
