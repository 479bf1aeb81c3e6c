"""Paths over a cache of a torch model: each sequence has a cache and a mask of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.subjects.protocol import Array


@dataclass
class Row:
    """The past of one sequence: the model's own cache, and which of its tokens are no padding."""

    cache: Any
    mask: Any


class RowByRow:
    """`prefill`, `extend` and `decode` from a model that runs one sequence on.

    A subclass says how a cache begins and how tokens are added to it.
    """

    def _no_past(self) -> Any:
        """Return the cache of no token."""
        raise NotImplementedError

    def _run_on(self, row: Row, ids: Any) -> Array:
        """Return logits ``(seq, vocab)`` of int64 ids ``(1, seq)``; the mask has them already."""
        raise NotImplementedError

    def prefill(
        self, input_ids: Array, lengths: Array | None = None, starts: Array | None = None
    ) -> tuple[Array, list[Row]]:
        """Return logits and a cache for each row; padding on the left goes by the mask."""
        batch, width = input_ids.shape
        ends = np.full(batch, width) if lengths is None else np.asarray(lengths)
        begins = np.zeros(batch, int) if starts is None else np.asarray(starts)
        state, logits = [], None
        for index in range(batch):
            row = Row(self._no_past(), torch.zeros(1, 0, dtype=torch.long))
            visible = np.arange(int(ends[index])) >= begins[index]
            out = self._advance(row, input_ids[index, : int(ends[index])], visible)
            if logits is None:
                logits = np.zeros((batch, width, out.shape[-1]), out.dtype)
            logits[index, : len(out)] = out
            state.append(row)
        assert logits is not None
        return logits, state

    def extend(self, state: list[Row], input_ids: Array, lengths: Array | None = None) -> Array:
        """Add tokens to every row and return their logits."""
        batch, width = input_ids.shape
        ends = np.full(batch, width) if lengths is None else np.asarray(lengths)
        pieces = []
        for index, row in enumerate(state):
            end = int(ends[index])
            out = self._advance(row, input_ids[index, :end], np.ones(end, bool))
            pieces.append(np.pad(out, ((0, width - end), (0, 0))))
        return np.stack(pieces)

    def decode(self, state: list[Row], input_ids: Array) -> Array:
        """Add one token to every row."""
        return self.extend(state, np.asarray(input_ids)[:, None])[:, 0]

    @torch.no_grad()
    def _advance(self, row: Row, ids: Array, visible: Array) -> Array:
        added = torch.from_numpy(visible.astype(np.int64))[None]
        row.mask = torch.cat([row.mask, added], dim=1)
        return self._run_on(row, torch.from_numpy(np.array(ids, np.int64))[None])
