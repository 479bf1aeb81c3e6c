"""``map``: the proof that the weight mapper puts every tensor of a checkpoint in its place, once.

Four independent answers: what the checkpoint holds, what the mapper consumes, where a content that
no two elements share arrives, and where the checkpoint's own content does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput
from harness.faults.library import parse
from harness.measure.oracle import stored
from harness.pipeline import parse_config
from harness.subjects.protocol import STORAGE_DTYPES, Array
from harness.tensors import Finding, Topology, take_inventory, topology_of

if TYPE_CHECKING:
    from harness.faults.model import Planted


@dataclass(frozen=True)
class MappingProof:
    """One question asked of every tensor.

    Attributes
    ----------
    question
        ``inventory``, ``consumed``, ``fingerprints`` or ``content``.
    layout
        Storage order of the matrices that it was asked for; empty where none is involved.
    expected
        Number of tensors that the config demands.
    proved
        Number of tensors of which the answer is yes.
    detail
        What was looked at.
    """

    question: str
    layout: str
    expected: int
    proved: int
    detail: str


@dataclass(frozen=True)
class MappingResult:
    """What became of every tensor.

    Attributes
    ----------
    verdict
        ``conforms``, ``diverges`` or ``not-proven``.
    fault
        The planted fault, if any.
    findings
        Every tensor that is not where it belongs, once for each way in which it is not.
    """

    checkpoint: str
    verdict: str
    fault: str | None
    tensors: int
    in_place: int
    findings: tuple[Finding, ...]
    proofs: tuple[MappingProof, ...]
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text: verdict, findings, and what was asked."""
        fault = f" with fault {self.fault}" if self.fault else ""
        yield (
            f"{self.verdict}: {self.in_place} of {self.tensors} tensors consumed once, in place"
            f"{fault}"
        )
        for finding in self.findings:
            yield f"  {finding.kind}: {finding.tensor}: {finding.detail}"
        for proof in self.proofs:
            layout = f" ({proof.layout})" if proof.layout else ""
            yield f"  {proof.question}{layout}: {proof.proved} of {proof.expected} {proof.detail}"
        for note in self.notes:
            yield f"  {note}"


def prove_mapping(path: Path, fault: str | None = None) -> MappingResult:
    """Prove, or refute, that the Relax weight mapper is a bijection that moves nothing.

    Parameters
    ----------
    path
        Checkpoint directory in the hub layout.
    fault
        Name of a fault of the weight mapper to plant first.

    Raises
    ------
    BadInput
        If checkpoint or config cannot be read, or the fault is not one of the mapper.
    """
    from relax_impl.config import MPTConfig
    from relax_impl.loader import mapping

    checkpoint = Checkpoint.open(path)
    parse_config(checkpoint.config, str(path / "config.json"))
    config = MPTConfig.from_dict(checkpoint.config)
    planted = _planted(fault, config.n_layers)
    topology = topology_of(checkpoint.config)
    inventory = take_inventory(topology, checkpoint)
    storage = checkpoint.storage_dtype
    dtype = storage if storage in STORAGE_DTYPES else "float32"

    findings = list(inventory.findings)
    proofs = [_proof("inventory", "", topology, findings, "there once, in shape and type")]
    for layout in _layouts():
        weight_map = mapping(config, layout)
        if planted is not None and planted.fault.weights is not None:
            weight_map = planted.fault.weights(weight_map, config, planted.layer)
        for question, ask in (
            ("consumed", _consumed),
            ("fingerprints", _fingerprints),
            ("content", _content),
        ):
            found, detail = ask(_Asked(config, topology, checkpoint, weight_map, dtype))
            proofs.append(_proof(question, layout.name, topology, found, detail))
            flawed = {finding.tensor for finding in inventory.findings}
            findings += [f for f in found if f.kind != "unread" or f.tensor not in flawed]
    findings = list(dict.fromkeys(findings))
    wrong = {finding.tensor for finding in findings}
    whole = all(proof.proved == proof.expected > 0 for proof in proofs)
    return MappingResult(
        checkpoint=str(path),
        verdict="diverges" if findings else ("conforms" if whole else "not-proven"),
        fault=planted.label if planted else None,
        tensors=len(topology),
        in_place=sum(name not in wrong for name in topology),
        findings=tuple(findings),
        proofs=tuple(proofs),
        notes=tuple(f"tensor {name} repeats the tied embedding" for name in inventory.aliases),
    )


def _planted(text: str | None, n_layers: int) -> Planted | None:
    if text is None:
        return None
    planted = parse(text, n_layers)
    if planted.fault.weights is None:
        raise BadInput(
            "this is no fault of the weight mapper",
            where=f"--fault {text}",
            found=f"one of {planted.fault.area}",
            hint="`mpt-conform check --fault` plants it",
        )
    return planted


def _layouts() -> list[Any]:
    """Return the storage orders that the port's targets use, each once."""
    from relax_impl.compile import default_operations
    from relax_impl.layout import ROWS

    return list(
        {layout.name: layout for layout in (ROWS, default_operations("llvm").layout)}.values()
    )


def _proof(
    question: str, layout: str, topology: Topology, findings: list[Finding], detail: str
) -> MappingProof:
    wrong = {finding.tensor for finding in findings}
    proved = sum(name not in wrong for name in topology)
    return MappingProof(question, layout, len(topology), proved, detail)


@dataclass(frozen=True)
class _Asked:
    config: Any
    topology: Topology
    checkpoint: Checkpoint
    weight_map: Any
    dtype: str


_Answer = tuple[list[Finding], str]
_Ask = Callable[[_Asked], _Answer]


def _consumed(asked: _Asked) -> _Answer:
    """Ask the port's own loader whether every tensor is a source of exactly one parameter."""
    from relax_impl.loader import WeightMapError, check

    class Demanded:
        """A checkpoint without flaws, so that only the map can be at fault."""

        tensors = tuple(
            _Entry(name, shape, asked.dtype, "topology") for name, shape in asked.topology.items()
        )
        read = staticmethod(asked.checkpoint.read)

    found: list[Finding] = []
    try:
        check(asked.config, Demanded(), asked.weight_map)
    except WeightMapError as error:
        for kind in ("missing", "unexpected", "misshapen", "mistyped", "duplicated", "unmapped"):
            for text in getattr(error, kind):
                name, _, detail = text.partition(": ")
                found.append(Finding(kind, name, detail))
    return found, "used by exactly one parameter"


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


def _fingerprints(asked: _Asked) -> _Answer:
    """Plant a number of its own in every element, and look for it in all parameters."""
    from relax_impl.proof import IN_OTHERS_TOO, prove

    proof = prove(asked.config, asked.weight_map, asked.dtype)
    found = []
    broken = {finding.tensor for finding in proof.problems}
    for finding in proof.problems:
        others = [name for name in finding.found_in if name != finding.tensor]
        if finding.problem == IN_OTHERS_TOO and set(others) <= broken:
            continue  # whole and in place; the parameters that hold some of it are named themselves
        seen = f"; its content is in {', '.join(others)}" if others else ""
        found.append(Finding("misplaced", finding.tensor, f"{finding.problem}{seen}"))
    answered = {finding.tensor for finding in proof.findings}
    found += [
        Finding("misplaced", name, "the proof says nothing of it")
        for name in asked.topology
        if name not in answered
    ]
    shapes = "shapes shrunk to the same structure" if proof.shrunk else "the model's own shapes"
    return found, f"found once, in place and orientation ({proof.elements} elements in {shapes})"


def _content(asked: _Asked) -> _Answer:
    """Map the checkpoint's own tensors and compare them with what lies in the files."""
    from relax_impl.loader import apply

    read = stored(asked.checkpoint.read, asked.dtype)
    found = []
    elements = 0
    for name, shape in asked.topology.items():
        sources = asked.weight_map.param_map.get(name, ())
        absent = [s for s in (name, *sources) if s not in asked.checkpoint.names]
        if absent or not sources:
            reason = f"{absent[0]} is not there" if absent else "no parameter is made of it"
            found.append(Finding("unread", name, reason))
            continue
        tensor = read(name)
        if tensor.shape != shape:
            found.append(Finding("unread", name, f"it has shape {tensor.shape}"))
            continue
        try:
            held = apply(asked.weight_map, name, asked.checkpoint.read, asked.dtype)
            problem = _difference(_rows(held, asked.weight_map.layout.width, shape), tensor)
        except Exception as error:
            problem = f"mapping it failed: {type(error).__name__}: {error}"
        if problem:
            found.append(Finding("altered", name, problem))
        elements += tensor.size
    return found, f"equal bit by bit after undoing the layout ({elements} elements)"


def _rows(held: Array, width: int, shape: tuple[int, ...]) -> Array:
    """Undo a packed layout from its definition: panels of ``width`` rows, rows innermost."""
    if not width or len(shape) != 2:
        return held
    unpacked = np.moveaxis(held, 2, 1).reshape(-1, held.shape[1])
    padding = unpacked[shape[0] :]
    if padding.astype(np.float64).any():
        raise ValueError("the padding of its last panel is not zero")
    return unpacked[: shape[0]]


def _difference(held: Array, tensor: Array) -> str | None:
    if held.shape != tensor.shape:
        return f"expected shape {tensor.shape}, found {held.shape}"
    if held.dtype != tensor.dtype:
        return f"expected {tensor.dtype.name}, found {held.dtype.name}"
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    wrong = np.ascontiguousarray(held).view(bits) != np.ascontiguousarray(tensor).view(bits)
    if not wrong.any():
        return None
    first = [int(i) for i in np.argwhere(wrong)[0]]
    return f"{int(wrong.sum())} of {tensor.size} elements differ, the first at index {first}"
