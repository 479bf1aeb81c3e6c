"""What the port holds, as tensors of the checkpoint: with the packing undone nothing hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.exposure import materialise
from harness.checkpoint.reader import Checkpoint
from harness.faults.library import library
from harness.faults.model import Planted
from harness.measure.arrival import Arrival, prove_arrival
from harness.measure.oracle import stored
from harness.subjects.relax import RelaxSubject, unpacked
from harness.tensors import topology_of
from relax_impl.layout import PANELS, ROWS

Array = np.ndarray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Rows that fill the last panel only in part, and biases.
    return materialise("biases", tmp_path_factory.mktemp("exposures"), "bfloat16")


def arrivals(folder: Path, fault: Planted | None = None) -> dict[str, Arrival]:
    opened = Checkpoint.open(folder)
    subject = RelaxSubject(folder, "float16", "llvm", fault)
    proved = prove_arrival(
        topology_of(opened.config), stored(opened.read, "float16"), subject.parameters()
    )
    return {a.tensor: a for a in proved}


def test_packed_tensors_arrive_under_their_own_names(folder: Path) -> None:
    subject = RelaxSubject(folder, "float16", "llvm")
    assert subject._model.library.layout == PANELS
    found = arrivals(folder)
    assert {a.detail for a in found.values()} == {"under its own name"}
    assert set(subject.parameters()) == set(found)
    assert len(subject.parameters()) == len(found)


def _swapped(i: int, j: int) -> Callable[[Array, Any], Array]:
    def change(array: Array, config: Any) -> Array:
        array[[i, j]] = array[[j, i]]
        return array

    return change


def planted(weights: Any, layer: int | None = 1) -> Planted:
    fault = library()["out-proj-transposed"]
    return Planted(replace(fault, weights=weights), layer)


@pytest.mark.parametrize("fault", ["permutation", "transposition", "stale layer"])
def test_what_leaves_the_numbers_alone_is_seen_in_the_packed_layout(
    fault: str, folder: Path
) -> None:
    from harness.faults.weights import changed

    def stale(weight_map: Any, config: Any, layer: int | None) -> Any:
        # Both layers get the matrix of layer 0; read once more, it is still one source a tensor.
        up = "transformer.blocks.{}.ffn.up_proj.weight"
        first = Checkpoint.open(folder).read(up.format(0))
        functions = dict(weight_map.map_func)
        functions[up.format(1)] = lambda array: weight_map.layout.store(first)
        return replace(weight_map, map_func=functions)

    mutations = {
        "permutation": (changed(_swapped(0, 17), "attn.Wqkv.weight"), "attn.Wqkv.weight"),
        "transposition": (library()["out-proj-transposed"].weights, "attn.out_proj.weight"),
        "stale layer": (stale, "ffn.up_proj.weight"),
    }
    mutation, tensor = mutations[fault]
    found = arrivals(folder, planted(mutation))
    lost = [name for name, arrival in found.items() if not arrival.arrived]
    assert lost == [f"transformer.blocks.1.{tensor}"]


@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (17, 5), (40, 16)])
@pytest.mark.parametrize("layout", [ROWS, PANELS], ids=lambda layout: layout.name)
def test_unpacking_undoes_packing(layout: Any, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    assert np.array_equal(unpacked(layout.store(matrix), shape, layout), matrix)


def test_what_is_no_packing_is_refused() -> None:
    packed = PANELS.store(np.ones((17, 5), np.float16))
    packed[1, 0, 1] = 1  # beyond the last row
    with pytest.raises(ValueError, match="no packed matrix"):
        unpacked(packed, (17, 5), PANELS)
