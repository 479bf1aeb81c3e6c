"""Calls into a subject: whatever goes wrong inside is the subject's failure, never a crash."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import out_of_memory, ran_out_of_memory
from harness.subjects.protocol import Array


@dataclass(frozen=True)
class SubjectFailure(Exception):
    """A subject raised, or returned something that its protocol does not allow.

    Attributes
    ----------
    call
        The call that failed, for example ``"block(layer=3)"``.
    reason
        One sentence.
    detail
        Traceback for the JSON report; empty when nothing was raised.
    """

    call: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.call}: {self.reason}"


def _call(call: str, function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        if ran_out_of_memory(error):
            raise out_of_memory(call) from error
        # A user's code may raise anything; the report carries the traceback.
        reason = f"raised {type(error).__name__}: {error}"
        raise SubjectFailure(call, reason, traceback.format_exc()) from error


def _array(call: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
    array = np.asarray(value)
    if array.shape != shape:
        raise SubjectFailure(call, f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise SubjectFailure(call, f"{name} has dtype {array.dtype.name}, expected a float dtype")
    return array


def call_array(
    call: str, function: Callable[..., Any], arguments: tuple[object, ...], shape: tuple[int, ...]
) -> Array:
    """Call ``function`` and return its one array, with its shape and dtype checked.

    Raises
    ------
    SubjectFailure
        If the call raises or what comes back is not a float array of ``shape``.
    """
    return _array(call, "the result", _call(call, function, *arguments), shape)


def call_state(
    call: str, function: Callable[..., Any], arguments: tuple[object, ...], shape: tuple[int, ...]
) -> tuple[Array, Any]:
    """Call ``function`` and return its array, checked, and the state that came with it.

    Raises
    ------
    SubjectFailure
        If the call raises, or does not return a pair that begins with a float array of ``shape``.
    """
    result = _call(call, function, *arguments)
    if not isinstance(result, tuple) or len(result) != 2:
        raise SubjectFailure(call, f"returned {type(result).__name__}, expected (logits, state)")
    return _array(call, "the logits", result[0], shape), result[1]


def call_plain(call: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Call ``function``, of whose result nothing is asked.

    Raises
    ------
    SubjectFailure
        If the call raises.
    """
    return _call(call, function, *arguments)


def call_taps(
    call: str,
    function: Callable[..., Any],
    arguments: tuple[object, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """Call ``function`` and return the taps named in ``shapes``.

    A block may return more taps than the config promises; those are left alone.

    Raises
    ------
    SubjectFailure
        If the call raises, a promised tap is missing, or one has a wrong shape or dtype.
    """
    result = _call(call, function, *arguments)
    if not isinstance(result, Mapping):
        raise SubjectFailure(call, f"returned {type(result).__name__}, expected a mapping of taps")
    missing = [name for name in shapes if name not in result]
    if missing:
        raise SubjectFailure(call, f"promised taps are missing: {', '.join(missing)}")
    return {name: _array(call, name, result[name], shape) for name, shape in shapes.items()}


def call_bias(subject: Any, n_heads: int, queries: int, keys: int) -> Array:
    """Return a subject's attention bias, with its shape checked but as narrow as it came.

    Raises
    ------
    SubjectFailure
        If the call raises, or the result does not broadcast to ``(n_heads, queries, keys)``.
    """
    call, full = f"attention_bias({queries}, {keys})", (n_heads, queries, keys)
    result = np.asarray(_call(call, subject.attention_bias, queries, keys))
    try:
        np.broadcast_to(result, full)
    except ValueError as error:
        reason = f"has shape {result.shape}, expected one that broadcasts to {full}"
        raise SubjectFailure(call, reason) from error
    return result
