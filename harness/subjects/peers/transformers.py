"""transformers' MPT as its users load it, with every config that it accepts.

`harness.subjects.transformers` refuses the configs of which fields are known to be ignored, and is
a healthy implementation for that reason. This one hides nothing.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.subjects.parts import DeployedTorchParts, to_numpy
from harness.subjects.peers.hub import Block, held, load_model, named_taps, reference_config
from harness.subjects.peers.rows import Row, RowByRow
from harness.subjects.protocol import Array, Rounding
from reference.hub import HubModel


class _AsLoaded(HubModel):
    """The reference room's parts of transformers' MPT, around a model loaded by itself."""

    def __init__(self, config: Any, model: Any, storage: str) -> None:
        self.config, self.model = config, model
        self.storage, self.device = storage, "cpu"  # type: ignore[assignment]

    @torch.no_grad()
    def embed(self, ids: Any) -> dict[str, Any]:
        """Return the rows, and no positions where there should be some."""
        taps: dict[str, Any] = super().embed(ids)
        if self.config.has_wpe:
            taps["transformer.wpe"] = torch.zeros_like(taps["transformer.wte"])
        return taps

    @torch.no_grad()
    def block(self, layer: int, hidden: Any) -> dict[str, Any]:
        """Return every tap of one block, as the model computes it and not as the config has it."""
        return named_taps(self.config, Block(self.model, layer)(self._stream(hidden)))


class TransformersPeer(RowByRow, DeployedTorchParts):
    """The library's own model, its parts and its cache.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype
        Storage dtype.
    """

    protocol = 2
    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._hub = load_model(checkpoint, dtype)
        state = {name: value for name, value in self._hub.state_dict().items()}
        super().__init__(
            _AsLoaded(reference_config(checkpoint), self._hub, dtype),
            "transformers-as-loaded-cpu",
            dtype,
            lambda: {name: held(value) for name, value in state.items()},
        )

    def _no_past(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._hub.config)

    def _run_on(self, row: Row, ids: Any) -> Array:
        out = self._hub(
            input_ids=ids, attention_mask=row.mask, past_key_values=row.cache, use_cache=True
        )
        return to_numpy(out.logits)[0]

    def fork(self, state: list[Row]) -> list[Row]:
        """Return copies of the caches."""
        return [Row(copy.deepcopy(row.cache), row.mask.clone()) for row in state]

    def truncate(self, state: list[Row], lengths: Array) -> list[Row]:
        """Cut every row."""
        for row, length in zip(state, np.asarray(lengths), strict=True):
            row.cache.crop(int(length) - row.cache.get_seq_length())
            row.mask = row.mask[:, : int(length)]
        return state


def load(checkpoint: Path, *, dtype: str, target: str) -> TransformersPeer:
    """Make the subject; ``target`` is not used."""
    return TransformersPeer(checkpoint, dtype)
