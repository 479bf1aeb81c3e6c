"""From named arrays to the torch tensors of one part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from reference.arithmetic import DTYPES
from reference.config import MPTConfig
from reference.topology import LAYER_PREFIX, Shape, block_shapes, embed_shapes, head_shapes

Read = Callable[[str], "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]


class BlockWeights(Mapping[str, Tensor]):
    """The tensors of one part, by the name within it (``attn.Wqkv.weight``).

    Parameters
    ----------
    tensors
        The tensors; a bias that the config does not have is absent.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._tensors)

    def replaced(self, name: str, tensor: Tensor) -> BlockWeights:
        """Return a copy with one tensor exchanged."""
        return BlockWeights(self._tensors | {name: tensor})


def as_tensor(
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    *,
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> Tensor:
    """Copy a numpy array, ml_dtypes' bfloat16 included, into a tensor.

    Parameters
    ----------
    array
        The array; may be read-only.
    dtype
        Type of the result; None keeps what there is after `storage`.
    storage
        Type to round to first: the weights as a subject in this precision holds them.
    """
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(np.array(array).view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    if storage is not None:
        tensor = tensor.to(DTYPES[storage])
    return tensor.to(device=device, dtype=None if dtype is None else DTYPES[dtype])


def block_weights(
    config: MPTConfig,
    layer: int,
    read: Read,
    *,
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> BlockWeights:
    """Read one block.

    Parameters
    ----------
    config
        The model.
    layer
        0 to ``n_layers - 1``.
    read
        Original tensor name to array.
    dtype, storage, device
        As in `as_tensor`. Matrices are widened in pieces when they are used, so that ``dtype=None``
        costs the least memory and ``dtype`` equal to the compute type the least time.

    Raises
    ------
    ValueError
        No such layer, or a tensor whose shape is not the config's.
    """
    if not 0 <= layer < config.n_layers:
        raise ValueError(f"layer: expected 0 to {config.n_layers - 1}, found {layer}")
    prefix = LAYER_PREFIX.format(layer)
    return _load(prefix, block_shapes(config), read, dtype, storage, device)


def embed_weights(
    config: MPTConfig,
    read: Read,
    *,
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> BlockWeights:
    """Read the embedding tables, under their full names; see `block_weights`."""
    return _load("", embed_shapes(config), read, dtype, storage, device)


def head_weights(
    config: MPTConfig,
    read: Read,
    *,
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> BlockWeights:
    """Read the final norm and the unembedding, under their full names; see `block_weights`."""
    return _load("", head_shapes(config), read, dtype, storage, device)


def _load(
    prefix: str,
    shapes: Mapping[str, Shape],
    read: Read,
    dtype: str | None,
    storage: str | None,
    device: str,
) -> BlockWeights:
    tensors = {}
    for name, shape in shapes.items():
        tensor = as_tensor(read(prefix + name), dtype=dtype, storage=storage, device=device)
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise ValueError(f"{prefix}{name}: expected shape {shape}, found {found}")
        tensors[name] = tensor
    return BlockWeights(tensors)
