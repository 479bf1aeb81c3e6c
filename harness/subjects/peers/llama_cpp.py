"""llama.cpp's MPT, through its C interface.

The inside is seen by the callback that llama.cpp calls for every node of its graph. A block alone
is a model of one layer that is given the stream in place of tokens; the head alone is such a model
whose layer adds nothing.

`llama_api` says which library that is.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.measure.oracle import stored
from harness.subjects.peers.gguf_file import write
from harness.subjects.peers.hub import reference_config
from harness.subjects.peers.llama_api import EvalCallback, api
from harness.subjects.protocol import Array, Rounding

_F32, _F16 = 0, 1
"""ggml's types of a cache."""
PREFIX = "transformer.blocks."


class _Nodes:
    """What the callback saw: values by the name of the node, and by its operation after a name."""

    def __init__(self, ggml: Any) -> None:
        self._ggml = ggml
        self.seen: dict[str, Array] = {}
        self.wanted = False
        self._after = ""

    def __call__(self, tensor: Any, ask: bool, data: Any) -> bool:
        if ask:
            return self.wanted
        if not self.wanted:
            return True
        ggml = self._ggml
        name = ggml.ggml_get_name(tensor).decode()
        operation = ggml.ggml_op_desc(tensor).decode()
        if name.startswith("kqv_out"):
            self._after = "attn.out_proj"
        elif name.startswith("ffn_inp"):
            self._after = ""
        # The projection has no name of its own: it is the product after the context, with its bias.
        if self._after and not name.startswith("kqv_out") and operation in ("MUL_MAT", "ADD"):
            name = self._after
        count = ggml.ggml_nelements(tensor)
        floats = ggml.ggml_nbytes(tensor) == 4 * count
        if floats and ggml.ggml_is_contiguous(tensor):
            value = np.empty(count, np.float32)
            address = value.ctypes.data_as(ctypes.c_void_p)
            ggml.ggml_backend_tensor_get(tensor, address, 0, value.nbytes)
            self.seen[name.split("-")[0]] = value
        return True


class _Model:
    """One GGUF file in memory, with a context."""

    def __init__(self, path: Path, dtype: str, length: int, width: int) -> None:
        self._api = api()
        options = self._api.llama_model_default_params()
        options.use_extra_bufts = False
        self._model = self._api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file returned NULL")
        self.nodes = _Nodes(self._api)
        self._callback = EvalCallback(self.nodes)
        given = self._api.llama_context_default_params()
        given.n_ctx = given.n_batch = given.n_ubatch = length
        given.n_seq_max = 1
        given.n_threads = given.n_threads_batch = _threads()
        given.flash_attn_type = 0
        given.type_k = given.type_v = _F16 if dtype == "float16" else _F32
        given.cb_eval = self._callback
        self._context = self._api.llama_init_from_model(self._model, given)
        if not self._context:
            raise RuntimeError("llama_init_from_model returned NULL")
        self._width = width

    def forget(self) -> None:
        """Empty the cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def run(self, given: Array, first: int = 0, *, taps: bool = False) -> dict[str, Array]:
        """Decode one sequence from a position on.

        Parameters
        ----------
        given
            int ids ``(seq,)``, or a stream ``(seq, d_model)`` in their place.
        first
            Position of its first token.
        taps
            Whether every node is looked at.

        Returns
        -------
        dict
            Flat float32 arrays by name of the node, and ``logits``.
        """
        call, count = self._api, len(given)
        width = given.shape[1] if given.ndim == 2 else 0
        batch = call.llama_batch_init(count, width, 1)
        try:
            batch.n_tokens = count
            if width:
                ctypes.memmove(
                    batch.embd, np.ascontiguousarray(given, np.float32).ctypes.data, 4 * given.size
                )
            for index in range(count):
                if not width:
                    batch.token[index] = int(given[index])
                batch.pos[index] = first + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = 1
            self.nodes.seen, self.nodes.wanted = {}, taps
            status = call.llama_decode(self._context, batch)
        finally:
            self.nodes.wanted = False
            call.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        flat = np.ctypeslib.as_array(call.llama_get_logits(self._context), (count * self._width,))
        return {**self.nodes.seen, "logits": flat.copy()}

    def close(self) -> None:
        """Give the memory back."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def _threads() -> int:
    import os

    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


_TAPS = {
    "norm_1": "attn_norm",
    "attn.context": "kqv_out",
    "attn.out_proj": "attn.out_proj",
    "attn.residual": "ffn_inp",
    "norm_2": "ffn_norm",
    "ffn.act": "ffn_gelu",
    "ffn.down_proj": "ffn_out",
    "output": "l_out",
}


_NARROW = frozenset(
    (
        "norm_1",
        "attn.Wqkv",
        "attn.context",
        "norm_2",
        "ffn.up_proj",
        "ffn.act",
        "attn.q_ln",
        "attn.k_ln",
    )
)
"""Taps that are float16 where they are used, though their node is float32.

A product with a float16 matrix rounds its other operand; so do that with the cache, and the
table of GELU.
"""


class LlamaCppSubject:
    """The whole model, and models of one layer for its parts.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype
        Of the matrices.
    """

    protocol = 2
    # Sums, scores and softmax are float32, and so is the stream.
    rounding = Rounding(scores="float32", residual="fused")

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._opened = Checkpoint.open(checkpoint)
        self._config = reference_config(checkpoint)
        self._read = stored(self._opened.read, dtype)
        self._length = max(int(self._config.max_seq_len), 64)
        self.name, self.dtype = "llama-cpp-cpu", dtype
        self._whole = self._make(self._opened.config, self._opened.names, self._read)
        self._parts: dict[int | str, _Model] = {}

    def _make(self, raw: Any, names: Any, read: Any) -> _Model:
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder) / "model.gguf", raw, tuple(names), read, self.dtype)
            return _Model(path, self.dtype, self._length, self._config.vocab_size)

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits, each row a sequence of its own."""
        return np.stack([self._logits(self._fresh(self._whole).run(row)) for row in input_ids])

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the rows of the embedding."""
        rows = []
        for ids in input_ids:
            seen = self._fresh(self._whole).run(ids, taps=True)
            rows.append(seen["embd"].reshape(len(ids), -1))
        taps = {"transformer.wte": np.stack(rows)}
        if self._config.has_wpe:
            seen = self._fresh(self._whole).run(input_ids[0], taps=True)
            row = seen["pos_embd"].reshape(input_ids.shape[1], -1)
            taps["transformer.wpe"] = np.broadcast_to(row, taps["transformer.wte"].shape).copy()
        return taps

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block."""
        if layer not in self._parts:
            self._parts[layer] = self._one_layer(layer)
        rows = []
        for hidden in hidden_states:
            seen = self._fresh(self._parts[layer]).run(np.asarray(hidden, np.float32), taps=True)
            rows.append(self._taps(seen, len(hidden)))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm and the logits, behind a layer that adds nothing."""
        if "head" not in self._parts:
            self._parts["head"] = self._one_layer(None)
        norms, logits = [], []
        for hidden in hidden_states:
            seen = self._fresh(self._parts["head"]).run(np.asarray(hidden, np.float32), taps=True)
            norms.append(self._as_used(seen["result_norm"]).reshape(len(hidden), -1))
            logits.append(self._logits(seen))
        return {"transformer.norm_f": np.stack(norms), "logits": np.stack(logits)}

    def prefill(
        self, input_ids: Array, lengths: Array | None = None, starts: Array | None = None
    ) -> tuple[Array, list[Any]]:
        """Return logits, and what each row has seen: a cache holds one row at a time."""
        if starts is not None:
            raise NotImplementedError("a sequence has no padding on the left")
        batch, width = input_ids.shape
        ends = np.full(batch, width) if lengths is None else np.asarray(lengths)
        rows = [_Row(self._copy(), 0) for _ in range(batch)]
        return self._advance(rows, input_ids, ends), rows

    def extend(self, state: list[Any], input_ids: Array, lengths: Array | None = None) -> Array:
        """Add tokens to every row and return their logits."""
        ends = np.full(len(state), input_ids.shape[1]) if lengths is None else np.asarray(lengths)
        return self._advance(state, input_ids, ends)

    def decode(self, state: list[Any], input_ids: Array) -> Array:
        """Add one token to every row."""
        return self.extend(state, np.asarray(input_ids)[:, None])[:, 0]

    def _advance(self, rows: list[Any], input_ids: Array, ends: Array) -> Array:
        made = np.zeros((*input_ids.shape, self._config.vocab_size), np.float32)
        for index, row in enumerate(rows):
            end = int(ends[index])
            out = row.model.run(input_ids[index, :end], row.length)
            made[index, :end] = self._logits(out)
            row.length += end
        return made

    def _copy(self) -> _Model:
        return self._make(self._opened.config, self._opened.names, self._read)

    def _fresh(self, model: _Model) -> _Model:
        model.forget()
        return model

    def _logits(self, seen: Mapping[str, Array]) -> Array:
        return seen["logits"].reshape(-1, self._config.vocab_size)

    def _one_layer(self, layer: int | None) -> _Model:
        """Make a model of one layer of the checkpoint, or of a layer that adds nothing."""
        source = f"{PREFIX}{0 if layer is None else layer}."
        outside = [n for n in self._opened.names if not n.startswith(PREFIX)]
        # The stream has its positions already.
        names = {n: n for n in outside if n != "transformer.wpe.weight"}
        for name in self._opened.names:
            if name.startswith(source):
                names[f"{PREFIX}0.{name.removeprefix(source)}"] = name

        def read(name: str) -> Array:
            array = self._read(names[name])
            silent = layer is None and name.startswith(PREFIX) and "norm" not in name
            return np.zeros_like(array) if silent else array

        return self._make({**self._opened.config, "n_layers": 1}, names, read)

    def _taps(self, seen: Mapping[str, Array], length: int) -> dict[str, Array]:
        fused = next(name for name in ("wqkv_clamped", "wqkv_b", "wqkv") if name in seen)
        up = "ffn_up_b" if "ffn_up_b" in seen else "ffn_up"
        named = {**_TAPS, "attn.Wqkv": fused, "ffn.up_proj": up}
        taps = {tap: seen[name].reshape(length, -1) for tap, name in named.items()}
        if self._config.qk_ln:
            taps["attn.q_ln"] = seen["Qcur"].reshape(length, -1)
            taps["attn.k_ln"] = seen["Kcur"].reshape(length, -1)
        return {
            tap: self._as_used(value) if tap in _NARROW else value for tap, value in taps.items()
        }

    def _as_used(self, value: Array) -> Array:
        return value.astype(np.float16) if self.dtype == "float16" else value


class _Row:
    """One sequence: a context of its own, and how far it has come."""

    def __init__(self, model: _Model, length: int) -> None:
        self.model, self.length = model, length

    def __del__(self) -> None:
        self.model.close()


def load(checkpoint: Path, *, dtype: str, target: str) -> LlamaCppSubject:
    """Make the subject; ``target`` is not used."""
    return LlamaCppSubject(checkpoint, dtype)
