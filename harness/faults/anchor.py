"""The anchor of a fault: what it takes hold of must still be there.

A fault that no longer changes anything would be reported as missed by the gate, or worse, as an
equivalent one that is rightly not flagged. Compared with what is deployed, the target's own kernels
and packed weights, are the module that would be compiled and the content of every parameter as it
would be loaded; nothing is run.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.reader import Checkpoint
from harness.faults.model import Fault, Planted

TARGET = "llvm"


def changes(planted: Planted, checkpoint: Path, dtype: str = "float16") -> bool:
    """Return whether a planted fault changes the graph or the parameters for a checkpoint.

    Parameters
    ----------
    planted
        A fault, everywhere or in one layer.
    checkpoint
        Directory in the hub layout.
    dtype
        Storage dtype.
    """
    opened = Checkpoint.open(checkpoint)
    key = (opened.digest, checkpoint, dtype)
    from harness.subjects.relax import planted_operations
    from relax_impl.config import MPTConfig

    config = true_config = MPTConfig.from_dict(opened.config)
    fault = planted.fault
    if fault.config is not None:
        config = fault.config(config)
    # The parts take a third of the time, and nearly every fault is in one of them; only what is
    # in none needs the functions of the whole model, which are made of them. What moves weights or
    # replaces a call leaves the graph as it is.
    asked = (False, True) if fault.operations or fault.config else ()
    for whole in asked:
        plain, operations = _plain(*key, whole)
        faulty = planted_operations(planted, TARGET) or operations
        if _graph(config, dtype, faulty, whole) != plain:
            return True
    if fault.calls is not None:
        return _replaces(fault)
    return fault.weights is not None and _moves(planted, true_config, opened, dtype)


def _replaces(fault: Fault) -> bool:
    """Return whether a method that the port offers is replaced by another."""
    from harness.subjects.protocol import PATH_METHODS
    from harness.subjects.relax import Deployed

    class Bare(Deployed):
        def __init__(self) -> None:
            pass

    assert fault.calls is not None
    port = Bare()
    fault.calls(port)
    return bool(vars(port).keys() & {"forward", *PATH_METHODS})


def shows(planted: Planted, checkpoint: Path, ids: Any, dtype: str = "float16") -> bool:
    """Return whether what is deployed gives other numbers with the fault than without.

    Both are compiled and run, free-running, and compared bit by bit at every tap. A compiler may
    undo what a graph says, so that a fault changes the graph and nothing else.

    Parameters
    ----------
    planted, checkpoint, dtype
        As for ``changes``.
    ids
        Token ids, int32 ``(batch, seq)``.
    """
    from harness.subjects.relax import RelaxSubject

    healthy, faulty = (
        _everything(RelaxSubject(checkpoint, dtype, TARGET, fault), ids)
        for fault in (None, planted)
    )
    return any(healthy[tap].tobytes() != faulty[tap].tobytes() for tap in healthy)


def _everything(subject: Any, ids: Any) -> dict[str, Any]:
    taps = dict(subject.embed(ids))
    stream = taps["hidden"]
    for layer in range(subject._config.n_layers):
        block = subject.block(layer, stream)
        stream = block["output"]
        taps |= {f"{layer}.{tap}": array for tap, array in block.items()}
    return {**taps, **subject.head(stream), "forward": subject.forward(ids)}


@lru_cache(maxsize=64)
def _plain(digest: str, checkpoint: Path, dtype: str, whole: bool) -> tuple[str, Any]:
    """Return the digest of the module without a fault, and its building blocks."""
    from relax_impl.compile import default_operations
    from relax_impl.config import MPTConfig

    config = MPTConfig.from_dict(Checkpoint.open(checkpoint).config)
    deployed = default_operations(TARGET)

    def operations(layer: int) -> Any:
        return deployed

    return _graph(config, dtype, operations, whole), operations


def _graph(config: Any, dtype: str, operations: Any, whole: bool) -> str:
    from relax_impl.compile import cache_key
    from relax_impl.graph import build_graph
    from relax_impl.target import resolve

    target = resolve(TARGET)
    with target:
        return cache_key(build_graph(config, dtype, operations, whole=whole).module, target)


def _moves(planted: Planted, config: Any, opened: Checkpoint, dtype: str) -> bool:
    """Return whether a parameter gets other content than without the fault."""
    from relax_impl.compile import default_operations
    from relax_impl.loader import convert, mapping

    plain = mapping(config, default_operations(TARGET).layout)
    assert planted.fault.weights is not None
    faulty = planted.fault.weights(plain, config, planted.layer)
    for name, sources in plain.param_map.items():
        if faulty.param_map[name] == sources and faulty.map_func[name] is plain.map_func[name]:
            continue
        before, after = (
            convert(m.map_func[name](*(opened.read(source) for source in m.param_map[name])), dtype)
            for m in (plain, faulty)
        )
        if before.shape != after.shape or not np.array_equal(before, after, equal_nan=True):
            return True
    return False
