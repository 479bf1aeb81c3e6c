"""Running a compiled model on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from relax_impl.compile import Library
from relax_impl.graph import variant_name
from relax_impl.loader import Parameters, numpy_dtype
from relax_impl.resident import OneLayer

Array = NDArray[Any]


class InputError(ValueError):
    """An input array has the wrong shape, dtype or content, or a layer does not exist."""


def _integers(ids: Any) -> Array:
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"ids: expected integers, found {ids.dtype}")
    return ids


class Model:
    """A compiled model with its weights.

    Parameters
    ----------
    library
        From `compile_model`.
    parameters
        From `load_parameters` or `lazy_parameters`, made for the same config, dtype and layout.
    by_layer
        Hold the weights of one layer at a time, each loaded when it is called; `forward` then goes
        from layer to layer. For a library compiled with ``whole=False``.

    Raises
    ------
    InputError
        Library and parameters do not fit, or the machine lacks the library's device.
    """

    def __init__(self, library: Library, parameters: Parameters, *, by_layer: bool = False) -> None:
        if library.executable is None:
            raise InputError(f"target: this machine has no {library.target} device")
        for field in ("config", "dtype", "layout"):
            here, there = getattr(library, field), getattr(parameters, field)
            if here != there:
                raise InputError(
                    f"parameters: expected {field} {here} as the library, found {there}"
                )
        self.library = library
        self.config = library.config
        self.dtype = library.dtype
        self.device = tvm.device("cpu" if library.target == "llvm" else library.target)
        self.numpy_dtype = numpy_dtype(library.dtype)
        self._machine = relax.VirtualMachine(library.executable, self.device)
        tensors = parameters.tensors
        self.weights: Mapping[str, Any] = (
            OneLayer(tensors, self._tensor)
            if by_layer
            else {name: self._tensor(value) for name, value in tensors.items()}
        )

    def embed(self, ids: Any) -> dict[str, Array]:
        """Embedding taps of ids (b, s): transformer.wte, maybe transformer.wpe, and hidden."""
        return self._taps("embed", "embed", "", self._ids(ids))

    def block(self, layer: int, hidden: Array) -> dict[str, Array]:
        """Every tap of one block, from the stream (b, s, d_model) in the storage dtype."""
        name = variant_name("block", self._variant(layer))
        prefix = f"transformer.blocks.{layer}."
        return self._taps(name, name, prefix, self._hidden(hidden))

    def head(self, hidden: Array) -> dict[str, Array]:
        """Taps transformer.norm_f and logits (float32) from the stream after the last block."""
        return self._taps("head", "head", "", self._hidden(hidden))

    def forward(self, ids: Any) -> NDArray[np.float32]:
        """Logits (b, s, vocab_size) of ids (b, s) by the deployed function, without taps."""
        given = self._ids(ids)
        if "forward" in self.library.functions:
            return self._call("forward", "", given).numpy()
        taps = self.library.functions["embed"].outputs
        stream = self._call("embed", "", given)[taps.index("hidden")]
        for layer in range(self.config.n_layers):
            name = variant_name("layer", self._variant(layer))
            stream = self._call(name, f"transformer.blocks.{layer}.", stream)
        return self.unembed(stream)

    def attend(self, q: Array, k: Array, v: Array, layer: int = 0) -> Array:
        """Context (b, sq, H, D) by the attention that `layer` uses.

        q is (b, sq, H, D) and holds the last sq of the sk positions; k and v are (b, sk, kvH, D).
        """
        c = self.config
        self._check("q", q, (None, None, c.n_heads, c.head_dim))
        self._check("k", k, (q.shape[0], None, c.kv_n_heads, c.head_dim))
        self._check("v", v, k.shape)
        if q.shape[1] > k.shape[1]:
            raise InputError(
                f"q: expected no more positions than the {k.shape[1]} of k, found {q.shape[1]}"
            )
        arrays = (self._tensor(array) for array in (q, k, v))
        return self._call(variant_name("attend", self._variant(layer)), "", *arrays).numpy()

    def extend(self, ids: Array, lengths: Array, starts: Array, caches: Sequence[Any]) -> Any:
        """Stream (b, s, d_model) of new ids after a past, left on the device.

        The caller answers for the sizes; `decoder.Decoder` is what checks them.
        """
        arrays = [self._tensor(np.asarray(a, np.int32)) for a in (ids, lengths, starts)]
        return self._call("extend", "", *arrays, *caches)

    def last(self, hidden: Any, index: Array) -> Any:
        """One position of every sequence of a stream on the device, (b, 1, d_model)."""
        return self._call("last", "", hidden, self._tensor(np.asarray(index, np.int32)))

    def unembed(self, hidden: Any) -> NDArray[np.float32]:
        """Logits (b, s, vocab_size) of a stream on the device."""
        return self._call("head", "", hidden)[-1].numpy()

    def _tensor(self, array: Any) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)

    def _call(self, function: str, prefix: str, *inputs: Any) -> Any:
        names = self.library.functions[function].parameters
        return self._machine[function](*inputs, *(self.weights[prefix + name] for name in names))

    def _taps(self, function: str, name: str, prefix: str, value: Any) -> dict[str, Array]:
        outputs = self.library.functions[name].outputs
        results = self._call(function, prefix, value)
        return {tap: result.numpy() for tap, result in zip(outputs, results, strict=True)}

    def _variant(self, layer: int) -> int:
        if not 0 <= layer < self.config.n_layers:
            raise InputError(f"layer: expected 0..{self.config.n_layers - 1}, found {layer}")
        return self.library.variants[layer]

    def _ids(self, ids: Any) -> Any:
        ids = self.checked_ids(ids)
        if self.config.has_wpe and ids.shape[1] > self.config.max_seq_len:
            raise InputError(
                f"ids: expected at most {self.config.max_seq_len} positions "
                f"(the position embedding ends there), found {ids.shape[1]}"
            )
        return self._tensor(ids)

    def checked_ids(self, ids: Any) -> NDArray[np.int32]:
        """Ids (b, s) as int32.

        Raises
        ------
        InputError
            They are no integers of this shape within the vocabulary.
        """
        ids = _integers(ids)
        if ids.ndim != 2 or 0 in ids.shape:
            raise InputError(f"ids: expected shape (batch, sequence), found {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise InputError(
                f"ids: expected 0..{self.config.vocab_size - 1}, found {ids.min()}..{ids.max()}"
            )
        return ids.astype(np.int32)

    def _hidden(self, hidden: Array) -> Any:
        self._check("hidden", hidden, (None, None, self.config.d_model))
        return self._tensor(hidden)

    def _check(self, name: str, array: Array, shape: tuple[int | None, ...]) -> None:
        if not isinstance(array, np.ndarray) or str(array.dtype) != self.dtype:
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{name}: expected an array of {self.dtype}, found {found}")
        fits = array.ndim == len(shape) and 0 not in array.shape
        if not fits or any(
            size not in (None, n) for size, n in zip(shape, array.shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(f"{name}: expected shape ({wanted}), found {array.shape}")
