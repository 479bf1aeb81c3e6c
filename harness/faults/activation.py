"""Faults of activation."""

from harness.faults.model import Fault

FAULTS: tuple[Fault, ...] = ()
