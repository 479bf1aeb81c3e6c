"""Peers: what is asked of whom, what is kept of it, and how it is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import BadInput
from harness.peers.campaign import questions
from harness.peers.cell import Cell, Speed
from harness.peers.features import FEATURES
from harness.peers.healthy import alarms, feature_of, healthy_questions, is_healthy_case
from harness.peers.record import Record
from harness.peers.table import columns, findings, markdown, page, states, to_plain
from harness.subjects.load import load_subject
from harness.subjects.peers.model import NotSupported, Peer
from harness.subjects.peers.registry import PEERS, peer


def cell(feature: str = "base", **changes: object) -> Cell:
    return Cell(
        **{
            "peer": "theirs",
            "feature": feature,
            "dtype": "float32",
            "state": "conforms",
            "versions": {"theirs": "1.0"},
            **changes,
        }  # type: ignore[arg-type]
    )


FAULTY = cell(
    "bias-max-16",
    state="diverges",
    first="alibi",
    fault="alibi-bias-max-ignored",
    logit_error=0.3,
    top1=17,
    positions=40,
)


def test_unknown_peer_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"there is no such peer.*did you mean onnxruntime"):
        peer("onnxruntim")


def test_missing_package_says_what_to_install(tmp_path: Path) -> None:
    absent = Peer("x", "", ("no_such_module",), (), "extra", "nowhere", ("float32",), taps=False)
    with pytest.raises(BadInput, match=r"not installed: no_such_module.*mpt-conformance\[extra\]"):
        absent.load(tmp_path, dtype="float32", target="llvm")


def test_what_stands_in_for_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Peer(
        "x", "", ("no_such_module",), (), "", "nowhere", ("float32",), taps=False,
        instead={"no_such_module": "THE_LIBRARY"},
    )  # fmt: skip
    assert absent.missing == ("no_such_module",)
    monkeypatch.setenv("THE_LIBRARY", "/somewhere")
    assert absent.missing == ()


def test_dtype_that_a_peer_lacks_is_no_divergence(tmp_path: Path) -> None:
    lacking = Peer("x", "", (), (), "", "nowhere", ("float32",), taps=False)
    with pytest.raises(NotSupported, match="expected float32, found float16"):
        lacking.load(tmp_path, dtype="float16", target="llvm")


def test_peer_is_loaded_by_its_prefix(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="peer:nobody"):
        load_subject("peer:nobody", tmp_path, dtype="float32", target="llvm")


@pytest.mark.parametrize("name", PEERS)
def test_reasons_are_about_features_that_are_asked(name: str) -> None:
    assert set(PEERS[name].cannot) <= set(FEATURES)
    assert PEERS[name].dtypes


def test_every_feature_of_the_issue_is_asked() -> None:
    assert {f"heads-{count}" for count in (*range(1, 13), 24)} < set(FEATURES)
    configs = {name: feature.exposure.config for name, feature in FEATURES.items()}
    assert configs["storywriter"]["attn_config"]["clip_qkv"] == 6
    assert isinstance(configs["storywriter"]["attn_config"]["clip_qkv"], int)
    assert configs["bias-max-16"]["attn_config"]["alibi_bias_max"] == 16
    assert configs["expansion-2"]["expansion_ratio"] == 2
    assert configs["no-alibi"]["attn_config"]["alibi"] is False
    assert FEATURES["long-context"].length > 512


def test_the_port_is_asked_everything_and_a_peer_its_core_in_every_dtype() -> None:
    asked = questions(("relax", "transformers"), tuple(FEATURES), ("float16", "float32"))
    mine = {(f.name, d) for name, f, d in asked if name == "relax"}
    theirs = {(f.name, d) for name, f, d in asked if name == "transformers"}
    assert mine == {(name, d) for name in FEATURES for d in ("float16", "float32")}
    assert {name for name, dtype in theirs if dtype == "float32"} == set(FEATURES)
    assert {n for n, d in theirs if d == "float16"} == {n for n, f in FEATURES.items() if f.core}


def test_healthy_cases_have_weights_of_their_own_and_dtypes_in_turn() -> None:
    asked = healthy_questions(("a", "b"), 4, (("float32",), ("float16", "float32")))
    assert [d for name, _, d in asked if name == "a"] == ["float32"] * 4
    assert [d for name, _, d in asked if name == "b"] == ["float16", "float32"] * 2
    seeds = {feature.exposure.seed for _, feature, _ in asked}
    assert len(seeds) == 4
    assert feature_of("base.3").exposure.seed in seeds


def test_record_goes_on_from_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "record"
    record = Record(file)
    record.add([FAULTY, Speed("theirs", 2, "float32", (3.0, 1.0, 2.0))])
    with file.open("a") as text:
        text.write('{"kind": "cell", "peer": "th')
    again = Record(file)
    assert again.cells == {FAULTY.key: FAULTY}
    assert again.speeds["theirs", 2].median == 2.0
    again.add([cell()])
    assert set(Record(file).cells) == {FAULTY.key, cell().key}


def test_record_of_another_version_is_asked_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    record.add([FAULTY])
    assert record.knows(FAULTY.key, {"theirs": "1.0"})
    assert not record.knows(FAULTY.key, {"theirs": "1.1"})


def test_record_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "record"
    file.write_text('{"kind": "cell"}\n')
    with pytest.raises(BadInput, match=r"record:1: is no record"):
        Record(file)


def test_table_tells_states_and_names_the_fault() -> None:
    cells = [
        cell(),
        cell(dtype="float16", state="diverges", first="logits"),
        FAULTY,
        cell("left-padding", state="not supported", reason="no | mask"),
        cell("storywriter", state="refuses", reason="TypeError: 6"),
    ]
    assert states(cells, "base", "theirs") == {"conforms": ("f32",), "diverges": ("f16",)}
    text = markdown(cells, [Speed("theirs", 1, "float32", (2.0,))])
    assert "| base | conforms f32, **diverges** f16 |" in text
    assert "| left-padding | not supported f32 |" in text
    assert "alibi-bias-max-ignored | logits off by 0.3; top-1 17 of 40" in text
    assert "TypeError: 6" in text
    assert "| theirs | float32 | 1 | 2.0 |" in text
    # A feature that cannot be asked is no finding.
    ((name, found),) = findings(cells)
    assert name == "theirs"
    assert {one.feature for one in found} == {"base", "bias-max-16", "storywriter"}


def test_the_port_stands_first_and_peers_as_in_the_registry() -> None:
    asked = [cell(peer=name) for name in ("theirs", "llm-foundry", "transformers", "relax")]
    assert columns(asked) == ("relax", "transformers", "llm-foundry", "theirs")


def test_long_message_is_cut_in_the_table_and_kept_in_the_data() -> None:
    told = [cell("storywriter", state="refuses", reason="word " * 60)]
    assert f"{'word ' * 31}word…" in markdown(told, [])
    assert to_plain(told, [])["cells"][0]["reason"] == "word " * 60


def test_command_of_a_cell_asks_it_again() -> None:
    """Of a healthy case too, which is no feature of the list."""
    ((name, feature, dtype),) = questions(("transformers",), ("base.7",), ("float32",))
    assert (name, feature, dtype) == ("transformers", feature_of("base.7"), "float32")
    assert is_healthy_case("base.7")
    assert not is_healthy_case("base") and not is_healthy_case("base.x")


def test_a_crash_is_told_as_loudly_as_a_divergence() -> None:
    crashed = cell("qk-ln", state="crashes", reason="ends the process with SIGABRT")
    text = markdown([crashed], [])
    assert "| qk-ln | **crashes** f32 |" in text
    assert "| qk-ln | float32 | crashes |  | ends the process with SIGABRT |" in text
    assert '<span class="crashes">' in page([crashed], [])


def test_page_escapes_what_a_peer_says() -> None:
    text = page([cell("storywriter", state="refuses", reason="<script>alert(1)</script>")], [])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_plain_data_says_on_what_and_how_often() -> None:
    cells = [cell("base.0"), cell("base.1", state="diverges")]
    (one,) = alarms(cells)
    assert (one.cases, one.flagged) == (2, 1)
    plain = to_plain([*cells, FAULTY], [])
    assert plain["alarms"][0]["flagged"] == 1
    assert list(plain["features"]) == ["bias-max-16"]
    # Two hundred cells that say the same are a figure.
    assert [one["feature"] for one in plain["cells"]] == ["bias-max-16"]
    json.dumps(plain)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "nobody"], "is not known or not installed"),
        (["--feature", "nothing"], "is not known or not installed"),
        (["--python", "nonsense"], "PEER=INTERPRETER"),
        (["--show"], "holds nothing to show"),
    ],
)
def test_command_refuses_in_one_sentence(words: list[str], said: str) -> None:
    code = "from harness.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "peers", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
