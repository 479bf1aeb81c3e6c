"""From a divergence to the name of the fault that it looks like, or to "none of these"."""
