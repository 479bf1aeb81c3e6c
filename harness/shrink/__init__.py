"""From a failing check to the smallest config and input that fail in the same way."""
