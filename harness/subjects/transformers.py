"""The transformers library's MPT as a subject, on the configs it honours."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput
from harness.measure.alibi import AttentionShape, probe_bias
from harness.measure.oracle import stored
from harness.subjects.protocol import Array, Rounding
from harness.subjects.torch import _numpy


class TransformersSubject:
    """Wraps ``reference.hub.HubModel``; it evaluates in the original's order."""

    protocol = 1
    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from reference.hub import HubModel, NotHonoured

        opened = Checkpoint.open(checkpoint)
        self.name = "transformers-cpu"
        self.dtype = dtype
        self._read = stored(opened.read, dtype)
        self._names = opened.names
        try:
            self._model = HubModel(opened.config, self._read, storage=dtype)  # type: ignore[arg-type]
        except NotHonoured as error:
            raise BadInput(
                f"transformers cannot judge this config: {error}",
                where=str(checkpoint / "config.json"),
            ) from error

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits of the unhooked model."""
        return _numpy(self._model.forward(input_ids))

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the embedding tap."""
        return {k: _numpy(v) for k, v in self._model.embed(input_ids).items()}

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        from reference.model import as_tensor

        hidden = as_tensor(np.asarray(hidden_states), storage=self.dtype)
        return {k: _numpy(v) for k, v in self._model.block(layer, hidden).items()}

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits."""
        from reference.model import as_tensor

        hidden = as_tensor(np.asarray(hidden_states), storage=self.dtype)
        return {k: _numpy(v) for k, v in self._model.head(hidden).items()}

    def attention_bias(self, query_length: int, key_length: int) -> Array:
        """Return the bias, measured through the model's own attention module."""
        from reference.alibi import slopes
        from reference.model import as_tensor

        config = self._model.config
        shape = AttentionShape(
            config.n_heads, config.kv_n_heads, config.head_dim, config.scale, self.dtype
        )

        def attend(q: Array, k: Array, v: Array) -> Array:
            return _numpy(self._model.attend(*(as_tensor(array) for array in (q, k, v))))

        rates = slopes(config.n_heads, config.alibi_bias_max).numpy()
        return probe_bias(attend, shape, rates, query_length, key_length)

    def parameters(self) -> dict[str, Array]:
        """Return the weights as they are held."""
        return {name: self._read(name) for name in self._names}


def load(checkpoint: Path, *, dtype: str, target: str) -> TransformersSubject:
    """Make the subject; ``target`` is not used."""
    return TransformersSubject(checkpoint, dtype)
