"""What the subjects made of torch models share: numpy in, numpy out, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from harness.subjects.protocol import Array


def to_numpy(tensor: Any) -> Array:
    """Return a tensor as float32 or float64, which hold every storage dtype exactly."""
    array = tensor.detach().cpu()
    return np.asarray((array if array.dtype.itemsize > 2 else array.float()).numpy())


class TorchParts:
    """A torch model that is called whole or part by part.

    Parameters
    ----------
    model
        Offers ``forward``, ``embed``, ``block`` and ``head`` on tensors, as the reference room's
        models do.
    name, dtype
        As the subject protocol has them.
    """

    protocol = 1

    def __init__(self, model: Any, name: str, dtype: str) -> None:
        self._model = model
        self.name = name
        self.dtype = dtype

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits of the whole model."""
        return to_numpy(self._model.forward(input_ids))

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the embedding taps."""
        return {tap: to_numpy(value) for tap, value in self._model.embed(input_ids).items()}

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        taps = self._model.block(layer, self._tensor(hidden_states))
        return {tap: to_numpy(value) for tap, value in taps.items()}

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits."""
        taps = self._model.head(self._tensor(hidden_states))
        return {tap: to_numpy(value) for tap, value in taps.items()}

    def _tensor(self, array: Array) -> Any:
        from reference.model import as_tensor

        return as_tensor(np.asarray(array), storage=self.dtype)


class DeployedTorchParts(TorchParts):
    """Torch parts whose attention can be called and whose weights can be seen.

    Parameters
    ----------
    model
        Offers ``attend`` and ``config`` too.
    parameters
        Returns the weights as they are held, by tensor name.
    """

    def __init__(
        self, model: Any, name: str, dtype: str, parameters: Callable[[], Mapping[str, Array]]
    ) -> None:
        super().__init__(model, name, dtype)
        self._held = parameters

    def attention_bias(self, query_length: int, key_length: int) -> Array:
        """Return the bias, measured through the model's own attention."""
        from harness.measure.alibi import AttentionShape, probe_bias
        from reference.alibi import slopes

        config = self._model.config
        rates = slopes(config.n_heads, config.alibi_bias_max).numpy() * float(config.alibi)

        def attend(q: Array, k: Array, v: Array) -> Array:
            return to_numpy(self._model.attend(*(self._tensor(array) for array in (q, k, v))))

        shape = AttentionShape.of(config, self.dtype)
        return probe_bias(attend, shape, rates, query_length, key_length)

    def parameters(self) -> Mapping[str, Array]:
        """Return the weights as they are held."""
        return self._held()
