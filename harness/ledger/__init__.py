"""The ledger: what every run measured, and everything that identifies the run."""
