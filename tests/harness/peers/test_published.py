"""reports/peers: the record is the data, and the table in docs/peers.md, JSON and page follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.peers.campaign import questions
from harness.peers.cell import OWN
from harness.peers.features import FEATURES
from harness.peers.record import Record
from harness.peers.table import markdown, page, to_plain
from harness.subjects.peers.registry import PEERS

ROOT = Path(__file__).resolve().parents[3]
PLACE = ROOT / "reports" / "peers"
BEGIN, END = "<!-- drawn: begin -->\n", "<!-- drawn: end -->\n"


@pytest.fixture(scope="module")
def record() -> Record:
    return Record(PLACE / "record.jsonl")


def test_documents_are_drawn_from_the_record(record: Record) -> None:
    cells, speeds = list(record.cells.values()), list(record.speeds.values())
    written = (ROOT / "docs" / "peers.md").read_text()
    _, begin, rest = written.partition(BEGIN)
    drawn, end, _ = rest.partition(END)
    assert begin and end
    assert drawn.strip() == markdown(cells, speeds).strip()
    assert (PLACE / "peers.html").read_text() == page(cells, speeds)
    plain = json.loads((PLACE / "peers.json").read_text())
    # The machine that drew it is another one.
    expected = {**to_plain(cells, speeds), "environment": plain["environment"]}
    assert plain == json.loads(json.dumps(expected))


def test_every_peer_was_asked_every_feature(record: Record) -> None:
    asked = questions((OWN, *PEERS), tuple(FEATURES), ("float32", "float16", "bfloat16"))
    widest = {(name, feature.name) for name, feature, _ in asked}
    assert widest <= {(name, feature) for name, feature, _ in record.cells}


def test_the_port_conforms_in_every_feature(record: Record) -> None:
    mine = {key: cell for key, cell in record.cells.items() if key[0] == OWN}
    assert {feature for _, feature, _ in mine} >= set(FEATURES)
    assert {cell.state for cell in mine.values()} == {"conforms"}


@pytest.mark.parametrize(
    ("peer", "feature", "dtype", "first", "fault"),
    [
        ("transformers", "bias-max-16", "float32", "alibi", "alibi-bias-max-ignored"),
        ("ctranslate2", "bias-max-16", "float32", "logits", "alibi-bias-max-ignored"),
        ("ctranslate2", "clip", "float32", "logits", "clip-qkv-ignored"),
        ("llama-cpp", "base", "float16", "transformer.blocks.0.ffn.act", "gelu-tanh"),
    ],
)
def test_faults_are_named_with_their_place(
    record: Record, peer: str, feature: str, dtype: str, first: str, fault: str
) -> None:
    cell = record.cells[peer, feature, dtype]
    assert (cell.state, cell.first, cell.fault) == ("diverges", first, fault)
