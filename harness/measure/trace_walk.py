"""A walk that takes the subject's side from a dump instead of running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from harness.measure.oracle import Part
from harness.measure.records import Event, Failure, Skip
from harness.measure.run import Walk, _Stream
from harness.measure.taps import BLOCK_PREFIX, Place, block_widths, head_widths, places
from harness.measure.traces import ALIBI, DEPLOYED, Dump
from harness.subjects.protocol import Array


class TraceWalk(Walk):
    """A walk that takes the subject's side from a dump.

    Each step is judged from the dump's own inputs to it, so that layer and sub-module are found
    although nothing can be run; teacher-forcing needs a subject that runs.
    """

    def __init__(self, oracle: Any, dump: Dump, cases: Any, **options: Any) -> None:
        super().__init__(oracle, dump.subject, cases, **options)
        self.dump = dump

    def events(self) -> Iterator[Event]:
        """Walk as far as the dump goes, and name what it lacks."""
        for place in places(self.config):
            if not any(place.path in taps for taps in self.dump.taps.values()):
                yield Skip("dump", place.path, "not in the dump")
        yield from super().events()

    def _taps(
        self,
        place: Place,
        stream: _Stream,
        method: str,
        arguments: tuple[object, ...],
        widths: Mapping[str, int],
    ) -> Iterator[Event | dict[str, Array]]:
        held = self.dump.taps[stream.case.name]
        prefix = f"{BLOCK_PREFIX}.{arguments[0]}." if method == "block" else ""
        found = {tap: held[prefix + tap] for tap in widths if prefix + tap in held}
        for tap, array in found.items():
            expected = (*stream.size, widths[tap])
            if array.shape != expected:
                reason = f"{prefix}{tap} has shape {array.shape}, expected {expected}"
                yield Failure(Place(place.layer, tap), stream.case.name, reason, "")
                return
        if found:
            yield found

    def _first_stream(self, taps: Mapping[str, Array]) -> Array | None:
        """Return the stream into block 0, if the dump holds every table it is the sum of."""
        needed = ("transformer.wte", "transformer.wpe")[: 1 + self.config.has_wpe]
        return super()._first_stream(taps) if all(tap in taps for tap in needed) else None

    def _forced(self, layer: int, part: Part, stream: _Stream) -> Iterator[Event]:
        given = stream.subject
        widths = block_widths(self.config)
        for result in self._taps(Place(layer, "output"), stream, "block", (layer,), widths):
            if not isinstance(result, dict):
                yield result
                continue
            taps = dict(result) if given is None else {"input": given, **result}
            yield from self._local(layer, part, stream, taps, _reachable(part, taps, widths))

    def _free(
        self, layer: int, stream: _Stream, golden: Mapping[str, Any], orders: Any, judged: bool
    ) -> Iterator[Event]:
        widths = block_widths(self.config)
        stream.subject = None
        for result in self._taps(Place(layer, "output"), stream, "block", (layer,), widths):
            if not isinstance(result, dict):
                continue
            stream.subject = result.get("output")
            if judged:
                yield from self._rows("free-running", layer, stream, result, golden, orders)

    def _runs(self, stream: _Stream) -> bool:
        return True

    def _head(self, part: Part, stream: _Stream) -> Iterator[Event]:
        widths = head_widths(self.config)
        golden, orders = self._chained_head(part, stream)
        for result in self._taps(Place(None, "logits"), stream, "head", (), widths):
            if not isinstance(result, dict):
                yield result
                continue
            given = {} if stream.subject is None else {"hidden": stream.subject}
            taps = {**given, **result}
            yield from self._local(None, part, stream, taps, _reachable(part, taps, widths))
            yield from self._rows("free-running", None, stream, result, golden, orders)
            stream.chained_logits = result.get("logits")

    def _deployed(self, stream: _Stream) -> Iterator[Event]:
        """Judge the logits of the deployed forward, and the dump's chain against them.

        A dump that was taken by hooks holds one set of logits, which then are the deployed ones.
        """
        name, chained = stream.case.name, stream.chained_logits
        logits = self.dump.taps[name].get(DEPLOYED, chained)
        if logits is None:
            return
        expected = (*stream.size, self.config.vocab_size)
        if logits.shape != expected:
            reason = f"{DEPLOYED} has shape {logits.shape}, expected {expected}"
            yield Failure(Place(None, "logits"), name, reason, "")
            return
        yield from self._logits(stream, logits, None if logits is chained else chained)

    def _alibi(self) -> Iterator[Event]:
        for stream in self.streams:
            table = self.dump.taps[stream.case.name].get(ALIBI)
            if table is None:
                continue
            if table.ndim == 4 and len(table) == 1:
                table = table[0]  # the original keeps its bias with a batch axis
            heads = self.config.n_heads
            fits = table.ndim == 3 and table.shape[0] == heads and table.shape[1] <= table.shape[2]
            if not fits:
                reason = f"alibi has shape {table.shape}, expected ({heads}, query, key)"
                yield Failure(Place(None, ALIBI), stream.case.name, reason, "")
                continue
            yield from self._alibi_table(table.shape[1], table.shape[2], given=np.asarray(table))


def _reachable(part: Part, taps: Mapping[str, Array], widths: Mapping[str, int]) -> dict[str, int]:
    """Return the taps that the dump holds together with everything they are computed from."""
    return {
        tap: width
        for tap, width in widths.items()
        if tap in taps and all(name in taps for name in part.inputs_of(tap))
    }
