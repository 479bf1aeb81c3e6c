"""Faults of residual."""

from harness.faults.model import Fault

FAULTS: tuple[Fault, ...] = ()
