"""``check --html``: one page that says what the record says, and asks nothing of the network."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from harness.pipeline import Request, check
from harness.report.page import page
from harness.report.record import FailureRecord, LogitRecord, TensorRecord

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Tags with their attributes, the table cells with their text; nesting is checked."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th") and self.cells:
            self.cells[-1][2] += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def reports(small, prompts):
    request = Request(checkpoint=small, prompts=str(prompts))
    return {
        "conforms": check(request),
        "diverges": check(replace(request, fault="norm-2-skipped@1")),
    }


def test_the_command_writes_it(command, small, prompts, tmp_path):
    path = tmp_path / "r.html"
    ran = command("check", small, "--prompts", prompts, "--html", path)
    assert ran.code == 0
    assert path.read_text().startswith("<!DOCTYPE html>")
    Parsed(path.read_text())


@pytest.mark.parametrize("verdict", ["conforms", "diverges"])
def test_every_tap_of_every_mode_has_a_cell_with_its_number(reports, verdict):
    report = reports[verdict]
    assert report.verdict == verdict
    parsed = Parsed(page(report))
    drawn = [(c[1]["title"], c[1]["class"], c[2]) for c in parsed.cells if "title" in c[1]]
    assert len(drawn) == len(report.taps) > 60
    titles = [title for title, _, _ in drawn]
    assert all(any(title.startswith(f"{tap.tap}: ") for title in titles) for tap in report.taps)
    assert all(re.fullmatch(r"(▲ )?(\d+\.\d\d|\d+|\de\d+|∞)", text) for _, _, text in drawn)
    # What diverges is marked by a sign and a border, not by colour alone.
    marked = [text for _, classes, text in drawn if "beyond" in classes]
    assert len(marked) == sum(tap.verdict == "diverges" for tap in report.taps)
    assert all(text.startswith("▲ ") for text in marked)


def test_the_first_divergence_is_on_top(reports):
    text = page(reports["diverges"])
    top = text[text.index("<header") : text.index("</header>")]
    assert "diverges: relax-llvm float16 with fault norm-2-skipped@1" in top
    assert "transformer.blocks.1.norm_2, layer 1" in top
    assert "norm-2-skipped@1" in text[text.index("Repeat it") : text.index("Error over limit")]
    assert "First divergence" not in page(reports["conforms"])


@pytest.mark.parametrize("verdict", ["conforms", "diverges"])
def test_nothing_comes_from_elsewhere_and_nothing_runs(reports, verdict):
    text = page(reports[verdict])
    parsed = Parsed(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", text)
    assert any("default-src 'none'" in meta.get("content", "") for meta in parsed.all("meta"))


def test_tables_can_be_read_aloud(reports):
    parsed = Parsed(page(reports["diverges"]))
    assert len(parsed.all("caption")) == len(parsed.all("table")) >= 6
    assert all(c[1].get("scope") in ("row", "col") for c in parsed.cells if c[0] == "th")
    assert parsed.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in parsed.all("meta"))
    assert "prefers-color-scheme: dark" in page(reports["diverges"])


def test_what_comes_from_outside_is_escaped(reports):
    evil = "<script>alert('x')</script>&\"'"
    report = replace(
        reports["diverges"],
        reason=evil,
        reproduce=evil,
        subject=replace(reports["diverges"].subject, name=evil, fault=evil),
        failures=(FailureRecord(evil, evil, evil, evil),),
        tensors=(TensorRecord(evil, False, evil),),
        logits=tuple(replace(row, case=evil) for row in reports["diverges"].logits),
        taps=tuple(replace(tap, case=evil) for tap in reports["diverges"].taps),
        environment={evil: evil},
    )
    text = page(report)
    Parsed(text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_what_is_not_finite_can_be_drawn(reports):
    broken = replace(
        reports["diverges"],
        taps=tuple(
            replace(tap, ratio=value, observed=value, verdict="diverges")
            for tap, value in zip(
                reports["diverges"].taps, [None, float("nan"), float("inf")], strict=False
            )
        ),
        logits=(LogitRecord("one token", 1, 0, 0, 0, float("nan"), float("inf"), None, None),),
    )
    parsed = Parsed(page(broken))
    assert [c[2] for c in parsed.cells if "title" in c[1]] == ["▲ ∞"] * 3


def test_failures_and_lost_tensors_are_listed(reports):
    report = replace(
        reports["diverges"],
        failures=(FailureRecord("logits", "a", "forward(): raised ValueError: no", "Traceback"),),
        tensors=(TensorRecord("transformer.wte.weight", False, "3 of 9 elements differ"),),
    )
    text = page(report)
    assert "forward(): raised ValueError: no" in text
    assert "3 of 9 elements differ" in text
    assert "1 of 1 tensors" in text


def test_a_subject_that_did_not_load_still_has_a_page(reports):
    bare = replace(reports["diverges"], taps=(), logits=(), tensors=(), conversion=None)
    assert "Error over limit" not in page(bare)
    Parsed(page(bare))
