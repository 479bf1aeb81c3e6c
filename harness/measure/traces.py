"""A subject that is a dump: what another process computed, read from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import BadInput
from harness.inputs import check_ids
from harness.measure.run import Case
from harness.measure.taps import places
from harness.subjects.protocol import STORAGE_DTYPES, Array, Rounding

IDS = "input_ids"
DEPLOYED = "forward"
"""Logits of the deployed forward, where they may differ from ``logits``, the chain's last tap."""
ALIBI = "alibi"
ROUNDING = ("scores", "probabilities", "residual", "activation", "accumulator")
_BARE = "dump"
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class RawDump:
    """A dump as the file has it.

    Attributes
    ----------
    arrays
        By case, then by module path of the tap or ``input_ids``; bfloat16 as ml_dtypes has it.
    metadata
        What the file says of itself.
    """

    arrays: Mapping[str, Mapping[str, Array]]
    metadata: Mapping[str, str]


def read_dump(path: Path) -> RawDump:
    """Read a safetensors file whose keys are ``CASE/TAP``, or ``TAP`` where there is one case.

    Raises
    ------
    BadInput
        If the file cannot be read, is no safetensors file, holds no tensor, or the same tap of the
        same case twice.
    """
    tensors, metadata = _read(path)
    if not tensors:
        raise BadInput("the dump is empty", where=str(path), expected="tensors named CASE/TAP")
    grouped: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        case, slash, tap = key.rpartition("/")
        taps = grouped.setdefault(case if slash else _BARE, {})
        if tap in taps:
            raise BadInput(
                f"tap {tap!r} is there with and without a case",
                where=str(path),
                expected=f"either {tap} or {_BARE}/{tap}",
            )
        taps[tap] = array
    return RawDump(grouped, metadata)


def _read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    import ml_dtypes
    import torch
    from safetensors import SafetensorError, safe_open

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
                elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
                    raise BadInput(
                        f"tensor {key!r} has a dtype that cannot be judged",
                        where=str(path),
                        expected=" or ".join(_FLOATS),
                        found=str(tensor.dtype).removeprefix("torch."),
                    )
                else:
                    result[key] = tensor.numpy()
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"not a safetensors file: {error}", where=str(path)) from error
    return result, metadata


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
    """The cases and taps of a dump that fits a config.

    Attributes
    ----------
    subject
        Name, storage dtype and rounding, from the file's metadata.
    cases
        Token ids by case name.
    taps
        Case name -> module path -> array, without the ids.
    """

    subject: DumpSubject
    cases: tuple[Case, ...]
    taps: Mapping[str, Mapping[str, Array]]

    @classmethod
    def open(cls, path: Path, config: Any, dtype: str, digest: str | None = None) -> Dump:
        """Read a dump.

        The file is safetensors. One case: ``input_ids`` beside the tap names. Several: each name
        preceded by ``CASE/``. Metadata may name ``subject``, ``dtype``, ``checkpoint`` (a digest)
        and the fields of ``Rounding``. Every case holds the same taps; ``alibi``, which belongs to
        no case, may stand under any of them.

        Parameters
        ----------
        config
            Decides the names of the taps, the vocabulary and the length.
        dtype
            Storage dtype that the dump is to be judged in.
        digest
            Of the checkpoint it is to be judged on; one that the dump states must equal it.

        Raises
        ------
        BadInput
            If the file is not such a dump or does not fit the config.
        """
        raw = read_dump(path)
        stated = _stated_dtype(path, raw.metadata, dtype)
        made_on = raw.metadata.get("checkpoint")
        if digest is not None and made_on is not None and made_on != digest:
            raise BadInput(
                "the dump was made on another checkpoint",
                where=f"{path}: metadata checkpoint",
                expected=digest[:12],
                found=made_on[:12],
                hint="name the checkpoint that it was made on",
            )
        known = {place.path for place in places(config)} | {IDS, DEPLOYED}
        taps: dict[str, dict[str, Array]] = {}
        cases = []
        for name, held in raw.arrays.items():
            _check_names(path, name, held, known)
            _check_dtypes(path, name, held, stated)
            ids = check_ids(
                held[IDS],
                f"{path}: {name}/{IDS}",
                vocab_size=config.vocab_size,
                max_seq_len=config.max_seq_len,
            )
            cases.append(Case(name, ids))
            taps[name] = {tap: array for tap, array in held.items() if tap != IDS}
        _check_even(path, taps)
        subject = DumpSubject(
            raw.metadata.get("subject", path.name), stated, _rounding(path, raw.metadata)
        )
        return cls(subject, tuple(cases), taps)


def _stated_dtype(path: Path, metadata: Mapping[str, str], dtype: str) -> str:
    where = f"{path}: metadata dtype"
    stated = metadata.get("dtype", dtype)
    if stated not in STORAGE_DTYPES:
        expected = " or ".join(STORAGE_DTYPES)
        raise BadInput("unknown storage dtype", where=where, expected=expected, found=repr(stated))
    if stated != dtype:
        raise BadInput(
            "the dump is of another dtype",
            where=where,
            expected=dtype,
            found=stated,
            hint=f"--dtype {stated}",
        )
    return stated


def _rounding(path: Path, metadata: Mapping[str, str]) -> Rounding:
    try:
        return Rounding(**{k: metadata[k] for k in ROUNDING if k in metadata})  # type: ignore[arg-type]
    except BadInput as error:
        raise BadInput(
            error.what,
            where=f"{path}: metadata {str(error.where).removeprefix('Rounding.')}",
            expected=error.expected,
            found=error.found,
        ) from error


def _check_names(path: Path, case: str, held: Mapping[str, Array], known: set[str]) -> None:
    strange = sorted(set(held) - known)
    if strange:
        raise BadInput(
            f"{strange[0]!r} of case {case!r} is not a tap of this config",
            where=str(path),
            hint="taps carry the module paths of the original checkpoint",
        )
    if IDS not in held:
        raise BadInput(
            f"case {case!r} has no token ids", where=str(path), expected=f"a tensor {case}/{IDS}"
        )
    if set(held) == {IDS}:
        raise BadInput(
            f"case {case!r} holds no taps", where=str(path), expected=f"at least {case}/logits"
        )


def _check_dtypes(path: Path, case: str, held: Mapping[str, Array], stated: str) -> None:
    """Wider than the storage dtype is legal; the other two-byte type is a mistaken ``--dtype``."""
    for tap, array in held.items():
        if tap == IDS:
            continue
        found = array.dtype.name
        narrow = found in ("float16", "bfloat16") and found != stated
        if found not in _FLOATS or (narrow and tap != ALIBI):
            raise BadInput(
                f"{case}/{tap} has another dtype than the dump",
                where=str(path),
                expected=f"{stated}, or wider",
                found=found,
                hint=f"--dtype {found}" if narrow else None,
            )
        if array.size == 0:
            raise BadInput(f"{case}/{tap} is empty", where=str(path), found=array.shape)


def _check_even(path: Path, taps: Mapping[str, Mapping[str, Array]]) -> None:
    """Refuse a tap that only some cases hold: the others would pass for it unseen."""
    every = {tap for held in taps.values() for tap in held} - {ALIBI}
    for case, held in taps.items():
        lacking = sorted(every - set(held))
        if lacking:
            raise BadInput(
                f"case {case!r} lacks {lacking[0]!r}, which another case holds"
                + (f" (and {len(lacking) - 1} more)" * (len(lacking) > 1)),
                where=str(path),
                expected="the same taps in every case",
                hint="dump them to two files",
            )
