"""Seeded random weights for any config, scaled so that faults show.

Plain random initialisation hides faults: gammas of 1 hide a norm weight that is lost, unit
embeddings hide a wrong epsilon and let the arg max follow the input token, flat attention hides the
bias.
A `ScaleProfile` says how far from that the weights are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cases.hub_layout import Format, write_checkpoint
from cases.topology import tensor_shapes

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class ScaleProfile:
    """How the random weights are spread.

    Attributes
    ----------
    embedding_std
        Of wte and wpe. With 0.02 the variance, 4e-4, is only 40 times the norms' epsilon of 1e-5.
    gamma_spread
        Standard deviation of the gammas around 1.
    gamma_flips
        Share of gammas whose sign is turned.
    gamma_outliers
        Number of gammas in each norm that are multiplied by 3 to 6.
    qkv_gain
        Standard deviation of queries and keys for normalised input; the scores' is about its square
        (times ``softmax_scale * sqrt(head_dim)``): 1.3 gives peaks without saturation.
    residual_gain
        Standard deviation of what a sub-module adds to the stream, for inputs of unit variance.
    outlier_channels
        Channels of the residual stream that every sub-module drives 8 times harder.
    row_spread
        Standard deviation of the log of each row's scale: the tail of the weights.
    bias_std
        Of every bias there is; norms' biases too.
    logit_std
        About what the logits come to.
    """

    embedding_std: float = 0.05
    gamma_spread: float = 0.3
    gamma_flips: float = 0.1
    gamma_outliers: int = 2
    qkv_gain: float = 1.3
    residual_gain: float = 0.3
    outlier_channels: int = 2
    row_spread: float = 0.3
    bias_std: float = 0.3
    logit_std: float = 2.0


DEFAULT_PROFILE = ScaleProfile()


def make_checkpoint(
    directory: Path,
    config_raw: Mapping[str, Any],
    *,
    seed: int,
    dtype: str,
    shards: int = 2,
    scale_profile: ScaleProfile = DEFAULT_PROFILE,
    fmt: Format = "bin",
) -> Path:
    """Write a checkpoint of seeded random weights in hub layout and return `directory`.

    Parameters
    ----------
    directory
        Where; made if it is not there.
    config_raw
        Config in the original's field names; its `torch_dtype` becomes `dtype`.
    seed
        Non-negative. Every tensor's values depend on the seed and the tensor's name alone.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    shards, fmt
        See `cases.hub_layout.write_checkpoint`.
    scale_profile
        How the weights are spread.
    """
    shapes = tensor_shapes(config_raw)
    return write_checkpoint(
        directory,
        config_raw,
        shapes,
        lambda name: random_tensor(name, shapes[name], seed, scale_profile),
        dtype=dtype,
        shards=min(shards, len(shapes)),
        fmt=fmt,
    )


def random_tensor(
    name: str, shape: tuple[int, ...], seed: int, profile: ScaleProfile = DEFAULT_PROFILE
) -> Float32:
    """Values of one tensor, float32, of `shape`.

    The name alone says what kind of tensor it is: an embedding, a norm's gamma, a bias, a
    projection into the residual stream, or another matrix.
    """
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, dtype=np.float32)
    module, kind = name.rsplit(".", 2)[-2:]
    if kind == "bias":
        return values * np.float32(profile.bias_std)
    if module in ("wte", "wpe", "lm_head"):
        return values * np.float32(profile.embedding_std)
    if len(shape) == 1:
        gammas = _gammas(values, generator, profile)
        if module == "norm_f":
            unscaled = profile.embedding_std * math.sqrt(shape[0])
            gammas *= np.float32(profile.logit_std / unscaled)
        return gammas
    rows = np.exp(profile.row_spread * generator.standard_normal(shape[0], dtype=np.float32))
    gain = 1.0
    if module == "Wqkv":
        gain = profile.qkv_gain
    elif module in ("out_proj", "down_proj"):
        gain = profile.residual_gain
        rows[_outliers(shape[0], profile)] *= 8
    values *= (rows * np.float32(gain / math.sqrt(shape[1])))[:, None]
    return values


def _outliers(width: int, profile: ScaleProfile) -> NDArray[np.int64]:
    """Outlier channels of the stream: the same ones in every layer, as in trained models."""
    count = min(profile.outlier_channels, width // 8)
    return np.random.default_rng(width).choice(width, count, replace=False)


def _gammas(values: Float32, generator: np.random.Generator, profile: ScaleProfile) -> Float32:
    width = len(values)
    gammas = 1 + np.float32(profile.gamma_spread) * values
    gammas[generator.random(width) < profile.gamma_flips] *= -1
    count = min(profile.gamma_outliers, width // 8)
    where = generator.choice(width, count, replace=False)
    gammas[where] *= generator.uniform(3, 6, count).astype(np.float32)
    return gammas.astype(np.float32)
