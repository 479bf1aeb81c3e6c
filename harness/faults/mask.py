"""Faults of mask."""

from harness.faults.model import Fault

FAULTS: tuple[Fault, ...] = ()
