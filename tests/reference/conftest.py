"""Small checkpoints in which no field of a config is without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from reference.config import MPTConfig
from reference.topology import topology

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors this small, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def raw() -> Callable[..., dict[str, Any]]:
    """A small config: fields of attn_config and of the top by keyword."""

    def make(attention: Mapping[str, Any] | None = None, **top: Any) -> dict[str, Any]:
        # 6 heads, so that the slopes are interleaved; width 48, so that head_dim is 8.
        base: dict[str, Any] = {
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 2,
            "vocab_size": 61,
            "max_seq_len": 64,
            "no_bias": True,
        }
        return base | top | {"attn_config": {"alibi": True} | dict(attention or {})}

    return make


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Arrays]:
    """Weights for a config. Norm weights are spread and biases are not zero; embeddings are small,
    so that epsilon shows."""

    def make(raw: Mapping[str, Any], seed: int = 0) -> Arrays:
        random = np.random.default_rng(seed)
        arrays = {}
        for name, shape in topology(MPTConfig.from_dict(raw)).items():
            values = random.standard_normal(shape)
            if len(shape) == 1:
                values = 0.3 * values + (1 if name.endswith("weight") else 0)
            elif "wte" in name or "wpe" in name:
                values = 0.02 * values
            else:
                values = values * 1.5 / np.sqrt(shape[1])
            arrays[name] = values.astype(np.float32)
        return arrays

    return make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 61, (2, 24)))
