"""The subject protocol, version 2: what an MPT implementation offers to be judged.

Only ``forward`` is required. A subject that offers more is judged more closely: with ``block`` each
sub-module is charged for its own errors only, with ``attention_bias`` the ALiBi slopes are measured
through the deployed attention, with ``parameters`` every tensor is proved to have arrived.

Version 2 adds the paths of a deployment: ``prefill``, ``extend``, ``decode``, ``fork``,
``truncate`` and ``attend``, all optional. A subject of version 1 is judged as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from harness.errors import BadInput

PROTOCOL_VERSION = 2
SUPPORTED_VERSIONS = (1, 2)
Array = NDArray[Any]
StorageDtype = Literal["float16", "bfloat16", "float32"]
STORAGE_DTYPES: tuple[str, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Rounding:
    """Where an implementation rounds to its storage dtype.

    The defaults are the order of the original implementation. The declaration decides which
    evaluation orders make the limits, so it stands in every verdict.

    Parameters
    ----------
    scores
        ``"storage"``: ``q.k`` and its scaled value are rounded before the softmax;
        ``"float32"``: they stay wide.
    probabilities
        ``"storage"``: softmax results are rounded before they weigh the values.
    residual
        ``"storage"``: a sub-module's result is rounded, then the sum is rounded;
        ``"fused"``: the addition happens before the only rounding.
    activation
        ``"storage"``: GELU sees the rounded up-projection; ``"fused"``: the unrounded one.
    accumulator
        What holds the sums of matrix products. ``"float32"``: rounded to nearest.
        ``"float32_cut"``: the matrix unit of a Hopper GPU, which adds 16 products to what it holds
        and cuts the sum to float32 towards zero, so that long sums come out too small, all by about
        the same share. Either this or ``"float16"`` must be declared to be accepted.
    """

    scores: Literal["storage", "float32"] = "storage"
    probabilities: Literal["storage", "float32"] = "storage"
    residual: Literal["storage", "fused"] = "storage"
    activation: Literal["storage", "fused"] = "storage"
    accumulator: Literal["float32", "float32_cut", "float16"] = "float32"

    def __post_init__(self) -> None:
        allowed = {
            "scores": ("storage", "float32"),
            "probabilities": ("storage", "float32"),
            "residual": ("storage", "fused"),
            "activation": ("storage", "fused"),
            "accumulator": ("float32", "float32_cut", "float16"),
        }
        for field, values in allowed.items():
            found = getattr(self, field)
            if found not in values:
                raise BadInput(
                    "unknown rounding policy",
                    where=f"Rounding.{field}",
                    expected=" or ".join(map(repr, values)),
                    found=repr(found),
                )


@runtime_checkable
class Subject(Protocol):
    """An MPT under test.

    Attributes
    ----------
    protocol
        Version of this protocol, 1 or 2.
    name
        Shown in reports, for example ``"relax-llvm"``.
    dtype
        Storage dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    rounding
        Declared rounding points; the original's order if the attribute is missing.
    left_out
        Methods of `PATH_METHODS` that a deployment has and this object cannot run, each with the
        reason; none if the attribute is missing. The report counts what needs them as left out.
    """

    name: str
    dtype: str

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Run the deployed path: ids int32 ``(batch, seq)`` to logits ``(batch, seq, vocab)``."""
        ...


OPTIONAL_METHODS: Mapping[str, str] = {
    "embed": "token embedding tap and the free-running chain",
    "block": "every tap inside the blocks",
    "head": "final norm and the chained logits",
    "attention_bias": "ALiBi measured through the deployed attention",
    "parameters": "proof that every tensor arrived",
}


PATH_METHODS: Mapping[str, str] = {
    "prefill": "(input_ids, lengths=None, starts=None) -> (logits, state)",
    "extend": "(state, input_ids, lengths=None) -> logits; the state holds the new tokens",
    "decode": "(state, input_ids (batch,)) -> logits (batch, vocab)",
    "fork": "(state) -> a state that shares nothing with it",
    "truncate": "(state, lengths (batch,)) -> the state with these many positions",
    "attend": "(q, k, v) -> context (batch, query, heads, dim), by the attention that is deployed",
}
"""Optional methods of version 2.

``input_ids`` are int32 ``(batch, seq)`` and logits ``(batch, seq, vocab)``. ``starts`` (batch,) are
positions of padding on the left, ``lengths`` (batch,) the end of each row within ``input_ids``;
what follows is padding. Logits of padding mean nothing. The positions of a state count padding on
the left, so that they go on where ``lengths`` ended. q is ``(batch, query, heads, dim)``, k and v
``(batch, key, kv_heads, dim)`` in the storage dtype; the queries are the last of the keys.
"""


def path_capabilities(subject: object) -> frozenset[str]:
    """Return the methods of `PATH_METHODS` that ``subject`` offers."""
    if getattr(subject, "protocol", PROTOCOL_VERSION) < 2:
        return frozenset()
    return frozenset(name for name in PATH_METHODS if callable(getattr(subject, name, None)))


def left_out(subject: object) -> Mapping[str, str]:
    """Return the methods that a subject leaves out on purpose, with its reasons."""
    return getattr(subject, "left_out", {})


def capabilities(subject: object) -> frozenset[str]:
    """Return the optional methods that ``subject`` offers."""
    return frozenset(name for name in OPTIONAL_METHODS if callable(getattr(subject, name, None)))


def validate(subject: object, source: str) -> Subject:
    """Return ``subject`` if it can be judged, with everything it declares checked.

    Raises
    ------
    BadInput
        If a required attribute is missing or the protocol version is not supported.
    """
    if not callable(getattr(subject, "forward", None)):
        raise BadInput(
            "the subject has no callable `forward`",
            where=source,
            expected="an object with forward(input_ids, lengths=None)",
            found=type(subject).__name__,
        )
    version = getattr(subject, "protocol", PROTOCOL_VERSION)
    if version not in SUPPORTED_VERSIONS or isinstance(version, bool):
        raise BadInput(
            "the subject speaks another protocol version",
            where=f"{source}: protocol",
            expected=" or ".join(map(str, SUPPORTED_VERSIONS)),
            found=repr(version),
        )
    dtype = getattr(subject, "dtype", None)
    # numpy's dtype equals its own name, and is no key of anything here.
    if not isinstance(dtype, str) or dtype not in STORAGE_DTYPES:
        raise BadInput(
            "the subject's storage dtype is not one that can be judged",
            where=f"{source}: dtype",
            expected=" or ".join(STORAGE_DTYPES),
            found=repr(dtype),
        )
    if not isinstance(getattr(subject, "name", None), str):
        raise BadInput("the subject has no name", where=f"{source}: name", expected="a string")
    rounding = getattr(subject, "rounding", None)
    if rounding is not None and not isinstance(rounding, Rounding):
        raise BadInput(
            "the subject's rounding is not a Rounding",
            where=f"{source}: rounding",
            expected="harness.subjects.protocol.Rounding",
            found=type(rounding).__name__,
        )
    return subject  # type: ignore[return-value]


def rounding_of(subject: object) -> Rounding:
    """Return the declared rounding points, or the original's order where none is declared."""
    declared = getattr(subject, "rounding", None)
    return declared if isinstance(declared, Rounding) else Rounding()


def widen(array: object) -> NDArray[np.float64]:
    """Return a subject's array in float64, which holds every storage dtype exactly."""
    return np.asarray(array).astype(np.float64)
