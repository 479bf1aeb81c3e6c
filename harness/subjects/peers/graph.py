"""transformers' MPT by way of a compiler: the whole model as one graph, and its parts as others.

A compiler's file only says how a torch module and an example become something that runs. A graph is
made when a shape is first seen, since most of these routes want it static.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.subjects.parts import to_numpy
from harness.subjects.peers.hub import (
    TORCH,
    Block,
    Embedding,
    Head,
    Whole,
    load_model,
    named_taps,
    reference_config,
)
from harness.subjects.protocol import Array, Rounding

Run = Callable[[Any], Sequence[Any]]
Build = Callable[[Any, Any], Run]
"""From a module and an example tensor to what maps such a tensor to the module's outputs."""


class GraphSubject:
    """Parts and whole of one model, each compiled for the shapes that it meets.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype
        Storage dtype.
    name
        As the subject protocol has it.
    build
        The compiler.
    rounding
        As the compiler fuses.
    """

    protocol = 1

    def __init__(
        self, checkpoint: Path, dtype: str, name: str, build: Build, rounding: Rounding
    ) -> None:
        self._config = reference_config(checkpoint)
        self._model = load_model(checkpoint, dtype)
        self._build = build
        self._graphs: dict[tuple[Any, ...], Run] = {}
        self.name, self.dtype, self.rounding = name, dtype, rounding

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits of the whole graph."""
        (logits,) = self._run("whole", lambda: Whole(self._model), self._ids(input_ids))
        return logits

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the embedding taps; where positions are not learned, none are added."""
        (rows,) = self._run("embed", lambda: Embedding(self._model), self._ids(input_ids))
        taps = {"transformer.wte": rows}
        if self._config.has_wpe:
            taps["transformer.wpe"] = np.zeros_like(rows)
        return taps

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        hidden = self._tensor(hidden_states)
        values = self._run(layer, lambda: Block(self._model, layer), hidden)
        return named_taps(self._config, values)

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits."""
        hidden = self._tensor(hidden_states)
        norm_f, logits = self._run("head", lambda: Head(self._model), hidden)
        return {"transformer.norm_f": norm_f, "logits": logits}

    def _ids(self, input_ids: Array) -> Any:
        return torch.from_numpy(np.array(input_ids)).to(torch.long)

    def _tensor(self, array: Array) -> Any:
        from reference.model import as_tensor

        return as_tensor(np.asarray(array), storage=self.dtype).to(TORCH[self.dtype])

    def _run(self, part: Any, module: Callable[[], Any], given: Any) -> list[Array]:
        key = part, tuple(given.shape)
        with torch.no_grad(), warnings.catch_warnings():
            # Of a compiler, about the libraries that it meets.
            warnings.simplefilter("ignore")
            if key not in self._graphs:
                self._graphs[key] = self._build(module().eval(), given)
            return [
                to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
                for value in self._graphs[key](given)
            ]
