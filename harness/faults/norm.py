"""Faults of norm."""

from harness.faults.model import Fault

FAULTS: tuple[Fault, ...] = ()
