"""transformers' MPT as its users load it, with every config that it accepts.

`harness.subjects.transformers` refuses the configs of which fields are known to be ignored, and is
a healthy implementation for that reason. This one hides nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.subjects.parts import DeployedTorchParts, to_numpy
from harness.subjects.peers.hub import Block, held, load_model, named_taps, reference_config
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


@dataclass
class _Row:
    """The past of one sequence."""

    cache: Any
    mask: Any


class TransformersPeer(DeployedTorchParts):
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

    def prefill(
        self, input_ids: Array, lengths: Array | None = None, starts: Array | None = None
    ) -> tuple[Array, list[_Row]]:
        """Return logits and a cache for each row; padding on the left goes by the mask."""
        from transformers import DynamicCache

        batch, width = input_ids.shape
        ends = np.full(batch, width) if lengths is None else np.asarray(lengths)
        begins = np.zeros(batch, int) if starts is None else np.asarray(starts)
        state, logits = [], None
        for index in range(batch):
            mask = torch.zeros(1, 0, dtype=torch.long)
            row = _Row(DynamicCache(config=self._hub.config), mask)
            visible = np.arange(int(ends[index])) >= begins[index]
            out = self._advance(row, input_ids[index, : int(ends[index])], visible)
            if logits is None:
                logits = np.zeros((batch, width, out.shape[-1]), out.dtype)
            logits[index, : len(out)] = out
            state.append(row)
        assert logits is not None
        return logits, state

    def extend(self, state: list[_Row], input_ids: Array, lengths: Array | None = None) -> Array:
        """Add tokens to every row and return their logits."""
        batch, width = input_ids.shape
        ends = np.full(batch, width) if lengths is None else np.asarray(lengths)
        pieces = []
        for index, row in enumerate(state):
            end = int(ends[index])
            out = self._advance(row, input_ids[index, :end], np.ones(end, bool))
            pieces.append(np.pad(out, ((0, width - end), (0, 0))))
        return np.stack(pieces)

    def decode(self, state: list[_Row], input_ids: Array) -> Array:
        """Add one token to every row."""
        return self.extend(state, np.asarray(input_ids)[:, None])[:, 0]

    def fork(self, state: list[_Row]) -> list[_Row]:
        """Return copies of the caches."""
        return [_Row(copy.deepcopy(row.cache), row.mask.clone()) for row in state]

    def truncate(self, state: list[_Row], lengths: Array) -> list[_Row]:
        """Cut every row."""
        for row, length in zip(state, np.asarray(lengths), strict=True):
            row.cache.crop(int(length) - row.cache.get_seq_length())
            row.mask = row.mask[:, : int(length)]
        return state

    @torch.no_grad()
    def _advance(self, row: _Row, ids: Array, visible: Array) -> Array:
        added = torch.from_numpy(visible.astype(np.int64))[None]
        row.mask = torch.cat([row.mask, added], dim=1)
        given = torch.from_numpy(np.array(ids, np.int64))[None]
        out = self._hub(
            input_ids=given, attention_mask=row.mask, past_key_values=row.cache, use_cache=True
        )
        return to_numpy(out.logits)[0]


def load(checkpoint: Path, *, dtype: str, target: str) -> TransformersPeer:
    """Make the subject; ``target`` is not used."""
    return TransformersPeer(checkpoint, dtype)
