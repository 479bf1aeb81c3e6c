"""ctranslate2's MPT: its own loader makes a model file, its Generator runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.protocol import Array, Rounding


class CTranslate2Subject:
    """Logits alone: nothing of ctranslate2 shows what is inside.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype
        Storage dtype.
    """

    protocol = 1
    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        import ctranslate2

        opened = Checkpoint.open(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            _convert(opened, dtype, Path(folder) / "model")
            self._generator = ctranslate2.Generator(
                str(Path(folder) / "model"), device="cpu", compute_type=dtype
            )
        self.name, self.dtype = "ctranslate2-cpu", dtype

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits, by ``forward_batch`` on token ids."""
        import ctranslate2

        batch, length = input_ids.shape
        ids = ctranslate2.StorageView.from_array(np.ascontiguousarray(input_ids, np.int32))
        ends = np.full(batch, length, np.int32) if lengths is None else np.asarray(lengths)
        ends = ctranslate2.StorageView.from_array(np.ascontiguousarray(ends, np.int32))
        return np.array(self._generator.forward_batch(ids, ends))


def _convert(opened: Checkpoint, dtype: str, path: Path) -> None:
    """Write the model file with the loader that ctranslate2 registers for ``MPTConfig``.

    That is the original's own class, from the remote code of the hub; the loader reads its modules.
    Here they are made of the checkpoint itself.
    """
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    read = stored(opened.read, dtype)
    tokens = {f"<{i}>": i for i in range(opened.config["vocab_size"])}
    tokenizer = SimpleNamespace(
        get_vocab=lambda: tokens, bos_token="<0>", eos_token="<0>", unk_token="<0>"
    )
    root = SimpleNamespace(config=SimpleNamespace(**opened.config))
    for name in opened.names:
        *modules, kind = name.split(".")
        node = root
        for module in modules:
            if not hasattr(node, module):
                setattr(node, module, SimpleNamespace())
            node = getattr(node, module)
        setattr(node, kind, torch.from_numpy(np.ascontiguousarray(read(name))))
    blocks = root.transformer.blocks
    root.transformer.blocks = [
        getattr(blocks, str(layer)) for layer in range(opened.config["n_layers"])
    ]
    with torch.no_grad():
        spec: Any = _MODEL_LOADERS["MPTConfig"](root, tokenizer)
    spec.validate()
    spec.optimize(quantization=dtype)
    path.mkdir()
    spec.save(str(path))


def load(checkpoint: Path, *, dtype: str, target: str) -> CTranslate2Subject:
    """Make the subject; ``target`` is not used."""
    return CTranslate2Subject(checkpoint, dtype)
