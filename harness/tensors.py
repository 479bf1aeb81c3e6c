"""The tensors a config demands against the tensors a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import BadInput, ConformanceError

if TYPE_CHECKING:
    from harness.checkpoint.reader import Checkpoint

FLOATS = ("float16", "bfloat16", "float32", "float64")
Topology = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Finding:
    """One tensor that is not as the config demands.

    Attributes
    ----------
    kind
        ``missing``, ``unexpected``, ``misshapen``, ``mistyped`` or ``duplicated``.
    tensor
        Name in the checkpoint.
    detail
        What was expected and found.
    """

    kind: str
    tensor: str
    detail: str


@dataclass(frozen=True)
class Inventory:
    """Every topology tensor against the checkpoint.

    Attributes
    ----------
    expected
        Number of tensors the config demands.
    sound
        Names that are there once, in the right shape and type.
    findings
        What is wrong.
    aliases
        Names beside the topology that repeat a demanded tensor bit for bit (a tied head).
    """

    expected: int
    sound: tuple[str, ...]
    findings: tuple[Finding, ...]
    aliases: tuple[str, ...]


def topology_of(config: Mapping[str, Any]) -> Topology:
    """Return the topology of a raw config, computed in both rooms and compared.

    Raises
    ------
    ConformanceError
        If the two rooms disagree: then one of them is wrong about the family.
    """
    from reference.config import MPTConfig as ReferenceConfig
    from reference.topology import topology as reference_topology
    from relax_impl.config import MPTConfig as RelaxConfig
    from relax_impl.topology import topology as relax_topology

    expected = reference_topology(ReferenceConfig.from_dict(config))
    ported = relax_topology(RelaxConfig.from_dict(config))
    if list(expected.items()) != list(ported.items()):
        differing = sorted(set(expected.items()) ^ set(ported.items()))
        raise ConformanceError(
            "the two rooms compute different topologies",
            where=differing[0][0] if differing else "order of tensors",
            hint="this is an error in this package, not in the checkpoint",
        )
    return expected


def take_inventory(topology: Topology, checkpoint: Checkpoint) -> Inventory:
    """Compare names, shapes, dtypes and multiplicity; reads contents only to recognise aliases."""
    held: dict[str, list[Any]] = {}
    for info in checkpoint.tensors:
        held.setdefault(info.name, []).append(info)
    types = Counter(i.dtype for i in checkpoint.tensors if i.name in topology and i.dtype in FLOATS)
    common = types.most_common(1)[0][0] if types else "float32"

    findings: list[Finding] = []
    sound: list[str] = []
    for name, shape in topology.items():
        entries = held.get(name, [])
        before = len(findings)
        if not entries:
            where = "named by the index, absent from its shard" * (name in checkpoint.index_missing)
            findings.append(Finding("missing", name, where or f"expected shape {shape}"))
        if len(entries) > 1:
            files = ", ".join(entry.file for entry in entries)
            findings.append(Finding("duplicated", name, f"there {len(entries)} times: {files}"))
        for entry in entries:
            if tuple(entry.shape) != shape:
                detail = f"expected shape {shape}, found {tuple(entry.shape)} in {entry.file}"
                findings.append(Finding("misshapen", name, detail))
            if entry.dtype != common:
                detail = f"expected {common} like the rest, found {entry.dtype} in {entry.file}"
                findings.append(Finding("mistyped", name, detail))
        if len(findings) == before:
            sound.append(name)

    aliases = []
    for name, entries in held.items():
        if name in topology:
            continue
        if _repeats_tied_head(name, topology, checkpoint):
            aliases.append(name)
        else:
            detail = f"shape {tuple(entries[0].shape)} in {entries[0].file}; the config has no use"
            findings.append(Finding("unexpected", name, detail))
    return Inventory(len(topology), tuple(sound), tuple(findings), tuple(aliases))


def _repeats_tied_head(name: str, topology: Topology, checkpoint: Checkpoint) -> bool:
    source = "transformer.wte.weight"
    if name != "lm_head.weight" or source not in topology or source not in checkpoint.names:
        return False
    head, embedding = checkpoint.read(name), checkpoint.read(source)
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    return bool((head.view(np.uint8) == embedding.view(np.uint8)).all())


def require_sound(inventory: Inventory, where: str) -> None:
    """Raise for the first tensor that is not as demanded.

    Raises
    ------
    BadInput
        Names the tensor, and how many more there are.
    """
    if not inventory.findings:
        return
    first, more = inventory.findings[0], len(inventory.findings) - 1
    raise BadInput(
        f"tensor {first.tensor} is {first.kind}: {first.detail}"
        + (f" (and {more} more)" * (more > 0)),
        where=where,
        hint="`mpt-conform map` lists all of them",
    )
