"""The dashboard: a ledger as pages that open from disk."""
