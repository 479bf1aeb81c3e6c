"""A decode step as one CUDA graph: the host asks for it once instead of for every kernel.

The position of a token is read on the device, so that one graph serves every step over a cache. Its
kernels are those of the calls, so that its logits have the same bits.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from relax_impl.cubin import DRIVER

if TYPE_CHECKING:
    from relax_impl.decoder import Cache
    from relax_impl.runtime import Model

NON_BLOCKING, RELAXED = 1, 2
"""A stream that does not wait for the default one; a capture during which others may allocate."""


class CudaError(RuntimeError):
    """The driver refused a call."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(DRIVER)


def _driver(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise CudaError(f"{name}: expected 0, found error {code} of the CUDA driver")


class Graph:
    """What a function launches, captured once and launched again as a whole.

    Parameters
    ----------
    device
        A CUDA device of TVM.
    run
        Calls compiled functions, on the current stream, with the same arguments every time. It runs
        twice: what the runtime allocates comes from its pool, which the first run fills.

    Attributes
    ----------
    result
        What `run` returned; its tensors hold what the last launch wrote.

    Raises
    ------
    CudaError
        If the driver refuses to capture.
    """

    def __init__(self, device: Any, run: Callable[[], Any]) -> None:
        self._stream = ctypes.c_void_p()
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        run()
        device.sync()
        _driver("cuStreamCreate", ctypes.byref(self._stream), NON_BLOCKING)
        with tvm_ffi.use_raw_stream(device, self._stream.value or 0):
            _driver("cuStreamBeginCapture_v2", self._stream, RELAXED)
            try:
                self.result = run()
            finally:
                _driver("cuStreamEndCapture", self._stream, ctypes.byref(self._graph))
        executable = ctypes.byref(self._executable)
        _driver("cuGraphInstantiateWithFlags", executable, self._graph, ctypes.c_ulonglong(0))

    def launch(self, stream: int | None = None) -> None:
        """Launch all of it on a stream, by default one of its own, and do not wait."""
        on = self._stream if stream is None else ctypes.c_void_p(stream)
        _driver("cuGraphLaunch", self._executable, on)

    def wait(self) -> None:
        """Wait for what was launched on its own stream."""
        _driver("cuStreamSynchronize", self._stream)

    def __del__(self) -> None:
        for name, handle in (
            ("cuGraphExecDestroy", self.__dict__.get("_executable")),
            ("cuGraphDestroy", self.__dict__.get("_graph")),
            ("cuStreamDestroy_v2", self.__dict__.get("_stream")),
        ):
            if handle:
                getattr(_library(), name)(handle)


class CapturedStep:
    """One token for every sequence of a cache, by replaying what was captured once.

    Between two steps other functions of the model may run, but what they return must be fetched
    before the next step: graph and calls take their scratch from one pool.

    Parameters
    ----------
    model
        On a CUDA device.
    cache
        With room for a token in every sequence. A cache that has grown since, or another one, needs
        a step of its own.

    Raises
    ------
    CudaError
        If the driver refuses to capture.
    ValueError
        If the cache is full.
    """

    def __init__(self, model: Model, cache: Cache) -> None:
        self._model = model
        # A cache may keep its step: they would not let go of each other.
        self._of = weakref.ref(cache)
        self._tensors = list(cache.tensors)
        self._require_room(cache)
        self._ids = model._tensor(np.zeros((cache.batch, 1), np.int32))
        self._places = [model._tensor(places) for places in (cache.lengths, cache.starts)]
        # The first run's token goes to a slot that the next step writes over.
        self._graph = Graph(model.device, self._run)

    def serves(self, cache: Cache) -> bool:
        """Whether this is the cache whose step was captured, with the memory that it had."""
        held = zip(cache.tensors, self._tensors, strict=True)
        return self._of() is cache and all(a is b for a, b in held)

    def __call__(self, cache: Cache, ids: Any) -> NDArray[np.float32]:
        """Add one token (b,) to every sequence; returns the logits that follow it, (b, vocab)."""
        self._require_room(cache)
        self._ids.copyfrom(self._model.checked_ids(np.asarray(ids)[:, None]))
        for held, places in zip(self._places, (cache.lengths, cache.starts), strict=True):
            held.copyfrom(places)
        self._graph.launch()
        self._graph.wait()
        cache.lengths = (cache.lengths + 1).astype(np.int32)
        logits: NDArray[np.float32] = self._graph.result[1].numpy()[:, 0]
        return logits

    def _require_room(self, cache: Cache) -> None:
        if int(cache.lengths.max()) >= cache.capacity or not self.serves(cache):
            raise ValueError(
                f"cache: expected the one that was captured, with room for a token, found "
                f"{int(cache.lengths.max())} of {cache.capacity} slots in use"
            )

    def _run(self) -> tuple[Any, Any]:
        hidden = self._model._call("extend", "", self._ids, *self._places, *self._tensors)
        return hidden, self._model._call("head", "", hidden)[-1]
