"""One walk through the model, part by part: golden, evaluation orders and subject side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from harness.measure.alibi import PHASES
from harness.measure.clock import Clock
from harness.measure.compare import (
    Proof,
    measure_bias,
    measure_difference,
    measure_tap,
    summarise_logits,
)
from harness.measure.oracle import Oracle, Part
from harness.measure.order_bias import probe_order, reference_bias
from harness.measure.records import Event, Failure, Measurement, Skip
from harness.measure.taps import (
    Place,
    block_widths,
    embed_widths,
    head_widths,
    shapes,
)
from harness.measure.workers import each
from harness.subjects.calls import SubjectFailure, call_array, call_bias, call_taps
from harness.subjects.protocol import OPTIONAL_METHODS, Array, capabilities

EXACT_TAPS = frozenset({"transformer.wte", "transformer.wpe"})
# The bias is measured over this many keys, and for the last queries of them as well as for one.
ALIBI_KEYS = 512
ALIBI_QUERIES = 5


@dataclass(frozen=True)
class Case:
    """One input: token ids int32 ``(batch, seq)`` under a name."""

    name: str
    ids: Array


@dataclass
class _Stream:
    """What flows into the next part, for one case."""

    case: Case
    golden: Any = None
    orders: list[Any] = field(default_factory=list)
    subject: Array | None = None
    golden_logits: Any = None
    order_logits: list[Any] = field(default_factory=list)
    chained_logits: Array | None = None

    def forget(self) -> None:
        """Let go of everything that was computed."""
        self.golden = self.subject = self.golden_logits = self.chained_logits = None
        self.orders, self.order_logits = [], []

    @property
    def size(self) -> tuple[int, int]:
        batch, length = self.case.ids.shape
        return int(batch), int(length)


class Walk:
    """Measures one subject on several cases; yields events in order of evaluation.

    Parameters
    ----------
    oracle
        Golden and orders for the subject's storage dtype and declared rounding.
    subject
        The MPT under test.
    cases
        Inputs, none empty.
    layers
        Layers to judge; the golden stream runs through all of them all the same.
    progress
        Called with a sentence before each part.
    proved
        What spares the exact statistics of a tap; see `measure_tap`.
    """

    def __init__(
        self,
        oracle: Oracle,
        subject: Any,
        cases: Sequence[Case],
        *,
        layers: frozenset[int] | None = None,
        progress: Callable[[str], None] = lambda text: None,
        proved: Proof | None = None,
    ) -> None:
        self.oracle = oracle
        self.config = oracle.config
        self.subject = subject
        self.offers = capabilities(subject)
        self.layers = frozenset(range(self.config.n_layers)) if layers is None else layers
        self.progress = progress
        self.proved = proved
        self.streams = [_Stream(case) for case in cases]

    def events(self) -> Iterator[Event]:
        """Walk from the token ids to the logits."""
        for name, meaning in OPTIONAL_METHODS.items():
            if name not in self.offers:
                yield Skip("capability", name, f"the subject has no {name}(): {meaning}")
        self.progress("embedding")
        yield from self._embed()
        self.progress("attention bias")
        yield from self._alibi()
        clock = Clock(self.config.n_layers, self.progress)
        for layer in range(self.config.n_layers):
            clock.layer(layer)
            yield from self._layer(layer)
        self.progress("head and deployed forward")
        part = self.oracle.part("head")
        for stream in self.streams:
            yield from self._head(part, stream)
            yield from self._deployed(stream)
            # Logits of a large vocabulary are the largest arrays of all: those of one case at once.
            stream.forget()

    # -- calls ---------------------------------------------------------------------------------

    def _taps(
        self,
        place: Place,
        stream: _Stream,
        method: str,
        arguments: tuple[object, ...],
        widths: Mapping[str, int],
    ) -> Iterator[Event | dict[str, Array]]:
        call = f"{method}({', '.join(str(a) for a in arguments if isinstance(a, int))})"
        try:
            yield call_taps(
                call, getattr(self.subject, method), arguments, shapes(widths, *stream.size)
            )
        except SubjectFailure as failure:
            yield Failure(place, stream.case.name, str(failure), failure.detail)

    def _rows(
        self,
        mode: Any,
        layer: int | None,
        stream: _Stream,
        observed: Mapping[str, Array],
        golden: Mapping[str, Any],
        orders: Sequence[Mapping[str, Any]],
    ) -> Iterator[Measurement]:
        for tap, array in observed.items():
            yield measure_tap(
                mode,
                Place(layer, tap),
                stream.case.name,
                array,
                golden[tap],
                [order[tap] for order in orders],
                self.oracle.storage,
                exact=tap in EXACT_TAPS,
                proved=self.proved,
            )

    # -- parts ---------------------------------------------------------------------------------

    def _embed(self) -> Iterator[Event]:
        import torch

        part = self.oracle.part("embed")
        for stream in self.streams:
            ids = torch.from_numpy(np.array(stream.case.ids)).to(self.oracle.device)
            golden = part.embed(self.oracle.golden, ids)
            orders = [part.embed(order, ids) for order in self.oracle.orders]
            stream.golden = golden["hidden"]
            stream.orders = [order["hidden"] for order in orders]
            if "embed" not in self.offers:
                continue
            widths = embed_widths(self.config)
            first = Place(None, "transformer.wte")
            for result in self._taps(first, stream, "embed", (stream.case.ids,), widths):
                if not isinstance(result, dict):
                    yield result
                    continue
                yield from self._rows("free-running", None, stream, result, golden, orders)
                stream.subject = self._first_stream(result)

    def _first_stream(self, taps: Mapping[str, Array]) -> Array | None:
        """Return the stream into block 0 from the subject's embedding taps."""
        return self.oracle.first_stream(taps)

    def _layer(self, layer: int) -> Iterator[Event]:
        part = self.oracle.part(layer)
        chosen = layer in self.layers
        for stream in self.streams:
            judged = "block" in self.offers and chosen
            golden, orders = self._chained(part, stream)
            if judged:
                yield from self._forced(layer, part, stream)
            if "block" in self.offers and self._runs(stream):
                yield from self._free(layer, stream, golden, orders, judged)
            stream.golden = golden["output"]
            stream.orders = [order["output"] for order in orders]

    def _chained(self, part: Part, stream: _Stream) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Carry golden and orders through one part, each from its own stream."""
        golden, *orders = each(
            lambda pair: part.chain(*pair),
            zip(
                (self.oracle.golden, *self.oracle.orders),
                (stream.golden, *stream.orders),
                strict=True,
            ),
            stream.golden.numel(),
        )
        return golden, orders

    def _chained_head(
        self, part: Part, stream: _Stream
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Carry golden and orders through the head, and keep their logits."""
        golden, orders = self._chained(part, stream)
        stream.golden_logits = golden["logits"]
        stream.order_logits = [order["logits"] for order in orders]
        return golden, orders

    def _runs(self, stream: _Stream) -> bool:
        """Whether the free-running chain has got this far."""
        return stream.subject is not None

    def _forced(self, layer: int, part: Part, stream: _Stream) -> Iterator[Event]:
        """Judge one block from the golden stream in the storage dtype, whole and step by step."""
        given = self.oracle.cast(stream.golden)
        place = Place(layer, "output")
        if not np.isfinite(given.astype(np.float64)).all():
            yield Failure(
                place,
                stream.case.name,
                "the golden stream into this block overflows "
                f"{self.oracle.storage}: the checkpoint cannot be held in it",
                "",
            )
            return
        widths = block_widths(self.config)
        for result in self._taps(place, stream, "block", (layer, given), widths):
            if not isinstance(result, dict):
                yield result
                continue
            source = self.oracle.tensor(given)
            yield from self._local(layer, part, stream, {"input": given, **result}, widths)
            golden, *orders = each(
                lambda order, source=source: part.chain(order, source),  # type: ignore[misc]
                (self.oracle.golden_like, *self.oracle.orders),
                source.numel(),
            )
            yield from self._rows("teacher-forced", layer, stream, result, golden, orders)

    def _local(
        self,
        layer: int | None,
        part: Part,
        stream: _Stream,
        taps: Mapping[str, Array],
        widths: Mapping[str, int],
    ) -> Iterator[Event]:
        """Judge every step from the subject's own inputs to it: each is charged for itself only."""
        for tap in widths:
            needed = part.inputs_of(tap)
            place = Place(layer, tap)
            if not all(np.isfinite(taps[name].astype(np.float64)).all() for name in needed):
                yield Skip("local", place.path, "its own inputs are not finite")
                continue
            inputs = {name: self.oracle.tensor(taps[name]) for name in needed}
            truth = part.step(tap, inputs)
            yield measure_tap(
                "local",
                place,
                stream.case.name,
                taps[tap],
                truth.golden,
                truth.orders,
                self.oracle.storage,
                heads=self.config.n_heads if tap == "attn.context" else None,
                unrounded=truth.unrounded,
                proved=self.proved,
            )

    def _free(
        self,
        layer: int,
        stream: _Stream,
        golden: Mapping[str, Any],
        orders: Sequence[Mapping[str, Any]],
        judged: bool,
    ) -> Iterator[Event]:
        widths = block_widths(self.config)
        given, stream.subject = stream.subject, None
        place = Place(layer, "output")
        for result in self._taps(place, stream, "block", (layer, given), widths):
            if not isinstance(result, dict):
                yield result
                continue
            stream.subject = result["output"]
            if judged:
                yield from self._rows("free-running", layer, stream, result, golden, orders)

    def _head(self, part: Part, stream: _Stream) -> Iterator[Event]:
        widths = head_widths(self.config)
        place = Place(None, "logits")
        golden, orders = self._chained_head(part, stream)
        if "head" not in self.offers:
            return
        given = self.oracle.cast(stream.golden)
        for result in self._taps(place, stream, "head", (given,), widths):
            if not isinstance(result, dict):
                yield result
                continue
            taps = {"hidden": given, **result}
            yield from self._local(None, part, stream, taps, widths)
        if stream.subject is None:
            return
        for result in self._taps(place, stream, "head", (stream.subject,), widths):
            if not isinstance(result, dict):
                yield result
                continue
            stream.chained_logits = result["logits"]
            yield from self._rows("free-running", None, stream, result, golden, orders)

    def _deployed(self, stream: _Stream) -> Iterator[Event]:
        ids = stream.case.ids
        try:
            logits = call_array(
                "forward", self.subject.forward, (ids,), (*ids.shape, self.config.vocab_size)
            )
        except SubjectFailure as failure:
            yield Failure(Place(None, "logits"), stream.case.name, str(failure), failure.detail)
            return
        yield from self._logits(stream, logits, stream.chained_logits)

    def _logits(self, stream: _Stream, logits: Array, chained: Array | None) -> Iterator[Event]:
        """Judge deployed logits against the golden, and against the chain if there is one."""
        name, golden, orders = stream.case.name, stream.golden_logits, stream.order_logits
        place = Place(None, "logits")
        yield measure_tap(
            "deployed",
            place,
            name,
            logits,
            golden,
            orders,
            self.oracle.storage,
            proved=self.proved,
        )
        if chained is not None:
            apart = Place(None, "forward-chain")
            yield measure_difference(apart, name, logits, chained, golden, orders, self.proved)
        summary = summarise_logits(name, stream.case.ids, logits, golden, orders)
        if summary is not None:
            yield summary

    # -- alibi ---------------------------------------------------------------------------------

    def _alibi(self) -> Iterator[Event]:
        if "attention_bias" not in self.offers:
            return
        keys = min(self.config.max_seq_len, ALIBI_KEYS)
        for queries in sorted({1, min(ALIBI_QUERIES, keys)}):
            yield from self._alibi_table(queries, keys)

    def _alibi_table(self, queries: int, keys: int, given: Array | None = None) -> Iterator[Event]:
        name = f"bias {queries}x{keys}"
        config = self.config
        place = Place(None, "alibi")
        try:
            observed = (
                call_bias(self.subject, config.n_heads, queries, keys) if given is None else given
            )
        except SubjectFailure as failure:
            yield Failure(place, name, str(failure), failure.detail)
            return
        golden = reference_bias(config, queries, keys)
        every = self.oracle.orders
        exact = next(order for order in every if order.compute == "float64")
        phases: tuple[float, ...] = PHASES
        if exact.accumulator != "float32":
            # Nobody has to sum as coarsely as was declared.
            exact, phases = replace(exact, accumulator="float32"), (0.0, *PHASES)
        asked = [*((order, 0.0) for order in every), *((exact, phase) for phase in phases)]
        orders = each(
            lambda pair: self._order_bias(pair[0], queries, keys, pair[1]), asked, golden.size
        )
        yield measure_bias(
            name,
            np.broadcast_to(observed, golden.shape).astype(np.float64),
            golden,
            orders,
            observed.dtype.name,
        )

    def _order_bias(self, order: Any, queries: int, keys: int, phase: float = 0.0) -> Any:
        return probe_order(self.oracle, order, queries, keys, phase)
