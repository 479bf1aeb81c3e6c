"""Everybody's MPT through one gate: which features of the config each of them honours."""
