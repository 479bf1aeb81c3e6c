"""How many faults the gate catches and how often it cries wolf: measured, and written down."""
