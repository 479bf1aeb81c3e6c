"""The engine: measure, judge, localise and report how an MPT differs from the reference."""
