"""The release gate: a declared policy held against the runs of a ledger."""
