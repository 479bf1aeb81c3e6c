"""ALiBi slopes, one per head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from relax_impl.config import MPTConfig


def alibi_slopes(n_heads: int, bias_max: float) -> NDArray[np.float64]:
    """Compute the slopes by the original's rule, in float64.

    With N the next power of two, the slopes of N heads are 2^(-i * bias_max / N) for i = 1..N.
    Fewer heads take every second one first, then the ones between them.

    Parameters
    ----------
    n_heads
        Number of query heads.
    bias_max
        Exponent of the flattest slope, `alibi_bias_max`.

    Returns
    -------
    ndarray
        Slopes in head order, shape (n_heads,).
    """
    power = 1 << (n_heads - 1).bit_length()
    slopes = np.exp2(-np.arange(1, power + 1) * (float(bias_max) / power))
    if power != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[0::2]])[:n_heads]
    return slopes


def slopes(config: MPTConfig) -> NDArray[np.float32]:
    """Return the slopes of `config` in float32, all zero without ALiBi, shape (n_heads,)."""
    if not config.alibi:
        return np.zeros(config.n_heads, np.float32)
    return alibi_slopes(config.n_heads, config.alibi_bias_max).astype(np.float32)
