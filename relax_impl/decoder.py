"""Running a model with a past: prefill, extend and decode, over a cache that can fork and go back.

The three are one compiled function, `extend`, with other sizes; nothing is compiled between steps,
lengths or batches.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from relax_impl.cached import PANEL, key_shape, value_shape
from relax_impl.runtime import Array, InputError, Model

Integers = NDArray[np.int32]


def _counts(name: str, given: Any, batch: int, low: int, high: int) -> Integers:
    """Return one int32 a sequence, within bounds."""
    array = np.asarray(given)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name}: expected {batch} integers, found {array.dtype} {array.shape}")
    if array.min() < low or array.max() > high:
        raise InputError(f"{name}: expected {low}..{high}, found {array.min()}..{array.max()}")
    return array.astype(np.int32)


@dataclasses.dataclass
class Work:
    """What has been asked of the compiled functions, counted where they are called.

    Attributes
    ----------
    calls
        Calls of `extend`.
    tokens
        Positions that ran through the blocks: the size of every ids array.
    logits
        Positions that ran through the head.
    scores
        Pairs of query and key that lie on or below the diagonal, of one head and layer.
    """

    calls: int = 0
    tokens: int = 0
    logits: int = 0
    scores: int = 0

    def __sub__(self, other: Work) -> Work:
        return Work(*(a - b for a, b in zip(_tuple(self), _tuple(other), strict=True)))


def _tuple(work: Work) -> tuple[int, ...]:
    return tuple(getattr(work, field.name) for field in dataclasses.fields(work))


class Cache:
    """Keys and values of a batch of sequences.

    Attributes
    ----------
    lengths
        Slots in use, of each sequence: tokens, and padding on their left. (b,) int32.
    starts
        How many of these are padding, (b,) int32.
    capacity
        Slots there are, a multiple of 16. A call that needs more makes them.
    step
        On a CUDA device, what replays a decode step over this cache; None before the second.
    """

    step: Any = None

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self._model = model
        self.lengths: Integers = np.zeros(batch, np.int32)
        self.starts: Integers = np.zeros(batch, np.int32)
        self.capacity = -(-max(capacity, 1) // PANEL) * PANEL
        panels = self.capacity // PANEL
        shapes = (s(model.config, batch, panels) for s in (key_shape, value_shape))
        blank = [np.zeros(shape, model.numpy_dtype) for shape in shapes]
        # Zeros, not what happens to lie there: a kernel may multiply an unused slot by zero.
        self.tensors = [
            tvm.runtime.tensor(blank[what], model.device)
            for _ in range(model.config.n_layers)
            for what in (0, 1)
        ]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held: 2 * layers * kv_heads * head_dim * capacity * bytes, for each sequence."""
        width = self._model.numpy_dtype.itemsize
        return sum(int(np.prod(tensor.shape)) * width for tensor in self.tensors)

    def fork(self) -> Cache:
        """Return a copy that shares nothing with this one."""
        return self.take(range(self.batch))

    def take(self, rows: Sequence[int] | Integers) -> Cache:
        """Return a copy of some sequences, in any order and number."""
        chosen = np.asarray(rows)
        if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
            raise InputError(f"rows: expected at least one integer, found {rows!r}")
        if chosen.min() < 0 or chosen.max() >= self.batch:
            raise InputError(f"rows: expected 0..{self.batch - 1}, found {chosen.tolist()}")
        copy = Cache.__new__(Cache)
        copy._model, copy.capacity = self._model, self.capacity
        copy.lengths, copy.starts = self.lengths[chosen], self.starts[chosen]
        device = self._model.device
        copy.tensors = [tvm.runtime.tensor(t.numpy()[chosen], device) for t in self.tensors]
        return copy

    def truncate(self, lengths: Any) -> None:
        """Forget all slots from `lengths` (b,) on: a roll-back. What they held is not erased."""
        wanted = _counts("lengths", lengths, self.batch, 0, self.capacity)
        if (wanted > self.lengths).any() or (wanted < self.starts).any():
            raise InputError(
                f"lengths: expected from {self.starts.tolist()} to {self.lengths.tolist()}, "
                f"found {wanted.tolist()}"
            )
        self.lengths = wanted

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots, at least doubling what there is."""
        if slots <= self.capacity:
            return
        larger = Cache(self._model, self.batch, max(slots, 2 * self.capacity))
        for index, old in enumerate(self.tensors):
            array = larger.tensors[index].numpy()
            held = old.numpy()
            array[:, :, : held.shape[2]] = held
            self.tensors[index] = tvm.runtime.tensor(array, self._model.device)
        self.capacity = larger.capacity


class Decoder:
    """The paths of a deployment over one compiled model.

    Parameters
    ----------
    model
        The compiled model with its weights.

    Attributes
    ----------
    work
        What was done so far.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.work = Work()
        self._last: Any = None

    def cache(self, batch: int, capacity: int = 1) -> Cache:
        """Return an empty cache for a number of sequences."""
        if batch < 1 or capacity < 1:
            raise InputError(f"batch, capacity: expected at least 1, found {batch}, {capacity}")
        return Cache(self.model, batch, capacity)

    def prefill(
        self, ids: Any, lengths: Any = None, starts: Any = None, *, last: bool = False
    ) -> tuple[NDArray[np.float32], Cache]:
        """Start a cache with prompts (b, s), padded on either side.

        Parameters
        ----------
        ids
            Token ids; what stands in padding is of no consequence.
        lengths
            Positions (b,) up to the end of each prompt; what follows is padding. By default s.
        starts
            Positions (b,) of padding on the left. By default 0.
        last
            Logits of the last position of each prompt only, (b, 1, vocab), instead of all.

        Returns
        -------
        logits, cache
            (b, s, vocab) float32, without meaning in padding; and the cache.
        """
        tokens = np.asarray(ids)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"ids: expected shape (batch, sequence), found {tokens.shape}")
        cache = self.cache(len(tokens), tokens.shape[1])
        if starts is not None:
            cache.starts = _counts("starts", starts, cache.batch, 0, tokens.shape[1] - 1)
        return self.extend(cache, tokens, lengths, last=last), cache

    def extend(
        self, cache: Cache, ids: Any, lengths: Any = None, *, last: bool = False
    ) -> NDArray[np.float32]:
        """Add tokens (b, s) to every sequence; of each the first `lengths` (b,) count.

        Returns
        -------
        ndarray
            Logits (b, s, vocab) float32, or (b, 1, vocab) of the last token each.
        """
        tokens = self.model.checked_ids(ids)
        batch, count = tokens.shape
        if batch != cache.batch:
            raise InputError(f"ids: expected {cache.batch} sequences as the cache, found {batch}")
        added = _counts(
            "lengths", np.full(batch, count) if lengths is None else lengths, batch, 1, count
        )
        ends = cache.lengths + added
        if (ends <= cache.starts).any():
            raise InputError(
                f"lengths: expected a token after the padding of {cache.starts.tolist()}, "
                f"found {ends.tolist()}"
            )
        self._within(ends - cache.starts)
        # Padding on the right is stored too, behind the end, where the next token overwrites it.
        cache.reserve(int(cache.lengths.max()) + count)
        hidden = self.model.extend(tokens, cache.lengths, cache.starts, cache.tensors)
        if last:
            hidden = self.model.last(hidden, added - 1)
        logits = self.model.unembed(hidden)
        cache.lengths = ends.astype(np.int32)
        self._count(cache.lengths - added, count, int(np.prod(logits.shape[:2])))
        return logits

    def decode(self, cache: Cache, ids: Any) -> NDArray[np.float32]:
        """Add one token (b,) to every sequence; returns the logits that follow it, (b, vocab)."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1:
            raise InputError(f"ids: expected shape (batch,), found {tokens.shape}")
        if self._captured(cache, tokens):
            logits: NDArray[np.float32] = cache.step(cache, tokens)
            self._count(cache.lengths - 1, 1, len(logits))
            return logits
        logits = self.extend(cache, tokens[:, None])[:, 0]
        return logits

    def _captured(self, cache: Cache, tokens: NDArray[Any]) -> bool:
        """Whether the cache has a captured step for these tokens, made with the second in turn."""
        again = self._last is not None and self._last() is cache
        self._last = weakref.ref(cache)
        fits = tokens.shape == (cache.batch,) and int(cache.lengths.max()) < cache.capacity
        if not fits or self.model.library.target != "cuda":
            return False
        self._within(cache.lengths + 1 - cache.starts)
        if cache.step is None or not cache.step.serves(cache):
            if not again:
                return False
            from relax_impl.kernels.cuda.captured import CapturedStep

            cache.step = CapturedStep(self.model, cache)
        return True

    def _count(self, past: Integers, count: int, logits: int) -> None:
        wide = past.astype(np.int64)
        self.work.calls += 1
        self.work.tokens += count * len(past)
        self.work.logits += logits
        self.work.scores += int((wide * count + count * (count + 1) // 2).sum())

    def _within(self, tokens: Array) -> None:
        config = self.model.config
        if config.has_wpe and tokens.max() > config.max_seq_len:
            raise InputError(
                f"ids: expected at most {config.max_seq_len} positions "
                f"(the position embedding ends there), found {tokens.max()}"
            )
