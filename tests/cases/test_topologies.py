"""The shipped topologies, against closed forms and against each room that computes them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import cases
from cases.topology import tensor_shapes

ROOT = Path(cases.__file__).parent
LINE = re.compile(r"(\S+) torch\.Size\(\[(\d+(?:, \d+)*)\]\)")

# Tensors and parameters of the releases.
TOTALS = {
    "mpt-7b-instruct": (194, 6_649_286_656),
    "mpt-7b-storywriter": (194, 6_649_286_656),
    "mpt-30b": (290, 29_957_200_896),
    "mpt-1b": (194, 1_311_311_872),
    "replit-code-v1.5": (194, 3_322_088_448),
}


def read(name: str) -> list[tuple[str, tuple[int, ...]]]:
    out = []
    for line in (ROOT / "topologies" / f"{name}.txt").read_text().splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        out.append((match[1], tuple(map(int, match[2].split(", ")))))
    return out


def test_every_file_is_expected() -> None:
    assert {file.stem for file in (ROOT / "topologies").glob("*.txt")} == set(TOTALS)


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name: str) -> None:
    tensors = read(name)
    assert len({tensor for tensor, _ in tensors}) == len(tensors)
    assert (len(tensors), sum(math.prod(shape) for _, shape in tensors)) == TOTALS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_the_config_gives_the_same_table_in_the_same_order(name: str) -> None:
    raw = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert list(tensor_shapes(raw).items()) == read(name)


def test_first_and_last_lines_of_instruct() -> None:
    lines = (ROOT / "topologies" / "mpt-7b-instruct.txt").read_text().splitlines()
    assert lines[:3] == [
        "transformer.wte.weight torch.Size([50432, 4096])",
        "transformer.blocks.0.norm_1.weight torch.Size([4096])",
        "transformer.blocks.0.attn.Wqkv.weight torch.Size([12288, 4096])",
    ]
    assert lines[-2:] == [
        "transformer.blocks.31.ffn.down_proj.weight torch.Size([4096, 16384])",
        "transformer.norm_f.weight torch.Size([4096])",
    ]
