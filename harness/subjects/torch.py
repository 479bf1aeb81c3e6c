"""The reference as a subject: the original's order of evaluation in the storage dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.measure.alibi import AttentionShape, probe_bias
from harness.measure.oracle import stored
from harness.subjects.protocol import Array, Rounding


def _numpy(tensor: Any) -> Array:
    """Return a tensor as float32 or float64, which hold every storage dtype exactly."""
    array = tensor.detach().cpu()
    return np.asarray((array if array.dtype.itemsize > 2 else array.float()).numpy())


class TorchSubject:
    """Wraps ``reference.model.Reference`` in the original's order."""

    protocol = 1
    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from reference.model import Reference

        opened = Checkpoint.open(checkpoint)
        self.name = "torch-cpu"
        self.dtype = dtype
        self._read = stored(opened.read, dtype)
        self._model = Reference(opened.config, self._read, storage=dtype)  # type: ignore[arg-type]
        self._names = opened.names

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits of the whole model."""
        return _numpy(self._model.forward(input_ids))

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the embedding taps."""
        return {k: _numpy(v) for k, v in self._model.embed(input_ids).items()}

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        taps = self._model.block(layer, self._tensor(hidden_states))
        return {k: _numpy(v) for k, v in taps.items()}

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits."""
        return {k: _numpy(v) for k, v in self._model.head(self._tensor(hidden_states)).items()}

    def attention_bias(self, query_length: int, key_length: int) -> Array:
        """Return the bias as the attention applies it."""
        from reference.alibi import slopes

        config = self._model.config
        shape = AttentionShape(
            config.n_heads, config.kv_n_heads, config.head_dim, config.scale, self.dtype
        )
        rates = slopes(config.n_heads, config.alibi_bias_max).numpy() * float(config.alibi)

        def attend(q: Array, k: Array, v: Array) -> Array:
            tensors = (self._tensor(a) for a in (q, k, v))
            return _numpy(self._model.attend(*tensors))

        return probe_bias(attend, shape, rates, query_length, key_length)

    def parameters(self) -> dict[str, Array]:
        """Return the weights as they are held."""
        return {name: self._read(name) for name in self._names}

    def _tensor(self, array: Array) -> Any:
        from reference.model import as_tensor

        return as_tensor(np.asarray(array), storage=self.dtype)


def load(checkpoint: Path, *, dtype: str, target: str) -> TorchSubject:
    """Make the subject; ``target`` is not used."""
    return TorchSubject(checkpoint, dtype)
