"""A subject that is a dump: what another process computed, judged without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.inputs import check_ids
from harness.measure.compare import summarise_logits
from harness.measure.oracle import Part
from harness.measure.records import Event, Failure, Skip
from harness.measure.run import Case, Walk, _Stream
from harness.measure.taps import BLOCK_PREFIX, Place, block_widths, head_widths, places
from harness.subjects.protocol import STORAGE_DTYPES, Array, Rounding

IDS = "input_ids"


@dataclass(frozen=True)
class DumpSubject:
    """What stands in for a subject; every method is answered from the file by ``TraceWalk``."""

    name: str
    dtype: str
    rounding: Rounding
    protocol: int = 1

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Raise: a dump cannot be run again."""
        raise RuntimeError("a dump cannot be run again")

    embed = block = head = attention_bias = forward


@dataclass(frozen=True)
class Dump:
    """The cases and taps of a dump file.

    Attributes
    ----------
    subject
        Name, storage dtype and rounding, from the file's metadata.
    cases
        Token ids by case name.
    taps
        Case name -> module path -> array.
    """

    subject: DumpSubject
    cases: tuple[Case, ...]
    taps: Mapping[str, Mapping[str, Array]]

    @classmethod
    def open(cls, path: Path, config: Any, dtype: str) -> Dump:
        """Read a dump.

        The file is safetensors. One case: ``input_ids`` beside the tap names. Several: each name
        preceded by ``CASE/``. Metadata may name ``subject``, ``dtype`` and the fields of
        ``Rounding``.

        Raises
        ------
        BadInput
            If the file is not such a dump or does not fit the config.
        """
        tensors, metadata = _read(path)
        stated = metadata.get("dtype", dtype)
        if stated not in STORAGE_DTYPES:
            raise BadInput(
                "unknown storage dtype",
                where=f"{path}: metadata dtype",
                expected=" or ".join(STORAGE_DTYPES),
                found=repr(stated),
            )
        if stated != dtype:
            raise BadInput(
                "the dump is of another dtype",
                where=f"{path}: metadata dtype",
                expected=dtype,
                found=stated,
                hint=f"--dtype {stated}",
            )
        fields = ("scores", "probabilities", "residual", "activation", "accumulator")
        rounding = Rounding(**{k: metadata[k] for k in fields if k in metadata})  # type: ignore[arg-type]
        grouped: dict[str, dict[str, Array]] = {}
        for key, array in tensors.items():
            case, slash, tap = key.rpartition("/")
            grouped.setdefault(case if slash else "dump", {})[tap] = array
        known = {place.path for place in places(config)} | {IDS}
        cases = []
        for name, taps in grouped.items():
            if IDS not in taps:
                raise BadInput(
                    f"case {name!r} has no token ids", where=str(path), expected=f"a tensor {IDS}"
                )
            strange = sorted(set(taps) - known)
            if strange:
                raise BadInput(
                    f"{strange[0]!r} is not a tap of this config",
                    where=str(path),
                    hint="taps carry the module paths of the original checkpoint",
                )
            ids = check_ids(
                taps.pop(IDS),
                f"{path}: {name}",
                vocab_size=config.vocab_size,
                max_seq_len=config.max_seq_len,
            )
            if not taps:
                raise BadInput(f"case {name!r} holds no taps", where=str(path))
            cases.append(Case(name, ids))
        if not cases:
            raise BadInput("the dump is empty", where=str(path))
        subject = DumpSubject(metadata.get("subject", path.name), stated, rounding)
        return cls(subject, tuple(cases), grouped)


def _read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    import ml_dtypes
    import torch
    from safetensors import safe_open

    if not path.is_file():
        raise BadInput("there is no such file", where=str(path))
    result: dict[str, Array] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(key)
                if tensor.dtype == torch.bfloat16:
                    bits = tensor.view(torch.uint16).numpy()
                    result[key] = bits.view(ml_dtypes.bfloat16)
                else:
                    result[key] = tensor.numpy()
    except Exception as error:
        raise BadInput(f"not a safetensors file: {error}", where=str(path)) from error
    return result, metadata


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
                yield Failure(place, stream.case.name, reason, "")
                return
        if found:
            yield found

    def _forced(self, layer: int, part: Part, stream: _Stream) -> Iterator[Event]:
        given = stream.subject
        widths = block_widths(self.config)
        for result in self._taps(Place(layer, "output"), stream, "block", (layer,), widths):
            if not isinstance(result, dict):
                yield result
                continue
            taps = dict(result) if given is None else {"input": given, **result}
            present = {tap: width for tap, width in widths.items() if tap in result}
            reachable = {
                tap: width
                for tap, width in present.items()
                if all(name in taps for name in part.inputs_of(tap))
            }
            yield from self._local(layer, part, stream, taps, reachable)

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

    def _head(self) -> Iterator[Event]:
        part = self.oracle.part("head")
        widths = head_widths(self.config)
        place = Place(None, "logits")
        for stream in self.streams:
            golden = part.chain(self.oracle.golden, stream.golden)
            orders = [
                part.chain(order, hidden)
                for order, hidden in zip(self.oracle.orders, stream.orders, strict=True)
            ]
            for result in self._taps(place, stream, "head", (), widths):
                if not isinstance(result, dict):
                    yield result
                    continue
                given = {} if stream.subject is None else {"hidden": stream.subject}
                taps = {**given, **result}
                reachable = {
                    tap: width
                    for tap, width in widths.items()
                    if tap in result and all(name in taps for name in part.inputs_of(tap))
                }
                yield from self._local(None, part, stream, taps, reachable)
                yield from self._rows("free-running", None, stream, result, golden, orders)
                if "logits" in result:
                    summary = summarise_logits(
                        stream.case.name,
                        stream.case.ids,
                        result["logits"],
                        golden["logits"],
                        self.oracle.storage,
                    )
                    if summary is not None:
                        yield summary

    def _deployed(self) -> Iterator[Event]:
        yield from ()

    def _alibi(self) -> Iterator[Event]:
        for stream in self.streams:
            table = self.dump.taps[stream.case.name].get("alibi")
            if table is None:
                continue
            if table.ndim < 2 or table.shape[-2] > table.shape[-1]:
                reason = f"alibi has shape {table.shape}, expected (heads, query, key)"
                yield Failure(Place(None, "alibi"), stream.case.name, reason, "")
                continue
            yield from self._alibi_table(*table.shape[-2:], given=table)
