"""Every page in a real browser, from disk: quiet, drawn, usable, and open to everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.ledger.store import Ledger

AXE = Path(__file__).parent / "axe" / "axe.min.js"
KINDS = ("index", "trend", "compare", "certificate", "run", "broken", "crept")
CHARTS = {
    "index": [],
    "trend": ["trend"],
    "compare": ["compare"],
    "certificate": ["kill-0", "rivals-0"],
    "run": ["heat", "slopes", "positions"],
    "broken": ["heat", "slopes", "positions"],
    "crept": ["heat", "slopes", "positions"],
}


@pytest.fixture(scope="module")
def place(site, recorded):
    """The file of each kind of page."""
    with Ledger.open(recorded) as ledger:
        runs = ledger.runs()
    broken = next(run.id for run in runs if run.fault)
    found = {name: site / f"{name}.html" for name in KINDS[:4]}
    found["run"] = site / "runs" / f"{runs[9].id}.html"
    found["broken"] = site / "runs" / f"{broken}.html"
    found["crept"] = site / "runs" / f"{runs[-1].id}.html"
    return found


def quiet(browser: Any) -> None:
    assert browser.errors == []
    outside = [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))]
    assert outside == []
    assert any(url.startswith("file:") for url in browser.requests), "nothing was heard at all"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_errors_or_requests_and_draws(browser, place, pictures, kind):
    browser.open(place[kind])
    quiet(browser)
    figures = browser.js(
        "[...document.querySelectorAll('figure')].map(f => [f.id, Number(f.dataset.drawn || 0),"
        "f.querySelectorAll('.plot svg path').length, f.querySelectorAll('tbody tr').length])"
    )
    assert [figure[0] for figure in figures] == CHARTS[kind]
    for name, rows, paths, lines in figures:
        # Behind every chart lies a table with the same rows.
        assert rows > 0 and lines == rows, name
        assert paths >= min(rows, 3), name
    browser.screenshot(pictures / f"{kind}.png")


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_serious_violation(browser, place, pictures, kind, look):
    browser.dark(look == "dark")
    if look == "phone":
        browser.size(390, 844, phone=True)
    try:
        browser.open(place[kind])
        browser.run_script(AXE)
        found = browser.js(
            "axe.run(document).then(r => ({passes: r.passes.length, violations: r.violations"
            ".filter(v => ['serious', 'critical'].includes(v.impact))"
            ".map(v => [v.id, v.impact, v.nodes.map(n => n.html.slice(0, 200)).slice(0, 4)])}))"
        )
        assert found["passes"] > 10, "axe has looked at nothing"
        assert found["violations"] == [], json.dumps(found["violations"], indent=1)
        if look == "phone":
            # Wide things scroll in their own frame; the page itself does not.
            assert browser.js("document.documentElement.scrollWidth") <= 390
        if look != "light":
            browser.screenshot(pictures / f"{kind}-{look}.png")
    finally:
        browser.dark(False)
        browser.size(1280, 900)


def test_the_overview_shows_state_margin_drift_gate_and_waiver(browser, place):
    browser.open(place["index"])
    text = browser.js("document.body.innerText")
    assert "✔ conforms" in text and "▲ diverges" in text and "? no run: not proven" in text
    assert "⚠ drifts" in text and "at most one false alarm in 1,000 runs" in text
    assert "BLOCKED: newest commit" in text
    assert "no runner yet" in text and "release manager" in text and "2099-01-01" in text
    lines = browser.js("document.querySelectorAll('.spark polyline').length")
    cells = browser.js("document.querySelectorAll('td.cell:not(.none)').length")
    assert lines == cells > 0


def test_filters_by_mouse_and_by_keyboard(browser, place, recorded):
    with Ledger.open(recorded) as ledger:
        runs = ledger.runs()
    browser.open(place["index"])
    rows = "[...document.querySelectorAll('.runs tbody tr')].filter(r => r.offsetParent).length"
    assert browser.js(rows) == len(runs)
    # The mouse sets the focus, the arrow keys choose, as for anybody.
    browser.click("#by-dtype")
    browser.key("ArrowDown")
    browser.key("Enter")
    chosen = browser.js("document.getElementById('by-dtype').value")
    assert chosen == "bfloat16"
    assert browser.js(rows) == sum(run.dtype == chosen for run in runs)
    browser.open(place["index"])
    # With the keyboard alone, from the top of the page.
    browser.tab_to("e.id === 'by-state'")
    browser.type("d")
    browser.wait("document.getElementById('by-state').value === 'diverges'")
    assert browser.js(rows) == sum(run.verdict == "diverges" for run in runs) == 1
    assert browser.js("document.getElementById('shown').textContent") == "1 cells, 1 runs"
    browser.tab_to("e.id === 'by-text'")
    browser.type("nothing is called so")
    assert browser.js(rows) == 0
    quiet(browser)


def test_compare_by_mouse_and_by_keyboard(browser, place, recorded, pictures):
    with Ledger.open(recorded) as ledger:
        runs = [run for run in ledger.runs() if run.dtype == "bfloat16" and run.subject == "relax"]
    good, bad = runs[0].id, runs[-1].id
    browser.open(place["compare"], f"#a={good}&b={bad}")
    summary = "document.getElementById('summary').textContent"
    assert browser.js(summary).startswith("a conforms, b diverges")
    assert "alibi-inverse-square" in browser.js("document.getElementById('difference').innerText")
    heads = browser.js(
        "[...document.querySelectorAll('#compare tbody tr')].map(r => r.cells[0].textContent)"
    )
    assert set(heads) == {f"a: {good}", f"b: {bad}"}
    browser.click("#swap")
    browser.wait(f"{summary}.startsWith('a diverges, b conforms')")
    browser.tab_to("e.id === 'swap'")
    browser.key("Enter")
    browser.wait(f"{summary}.startsWith('a conforms, b diverges')")
    browser.tab_to("e.id === 'mode'")
    before = browser.js("document.querySelector('#compare tbody').textContent")
    browser.key("ArrowDown")
    browser.wait("document.getElementById('mode').value === 'teacher-forced'")
    browser.wait(f"document.querySelector('#compare tbody').textContent !== {json.dumps(before)}")
    quiet(browser)
    browser.screenshot(pictures / "compared.png")


def test_the_trend_shows_anchor_and_alarm_of_the_creep(browser, place, recorded, pictures):
    browser.open(place["index"])
    link = browser.js("[...document.links].find(a => a.textContent.includes('drifts')).hash")
    browser.open(place["trend"], link)
    browser.js(
        "(() => { const s = document.getElementById('series');"
        "s.value = [...s.options].find(o => o.textContent === 'local of_limit').value;"
        "s.dispatchEvent(new Event('change')); })()"
    )
    marks = "[...document.querySelectorAll('#trend tbody tr')].map(r => r.cells[6].textContent)"
    browser.wait(f"{marks}.some(m => m.includes('drift alarm'))")
    found = browser.js(marks)
    with Ledger.open(recorded) as ledger:
        crept = [run for run in ledger.runs() if run.subject.startswith("examples.own_mpt")]
    assert len(found) == len(crept)
    assert found[0] == "anchor"
    alarm = next(at for at, mark in enumerate(found) if "drift alarm" in mark)
    assert crept[alarm].seeds.get("age", 0) > 0
    quiet(browser)
    browser.screenshot(pictures / "creep.png")


def test_a_run_page_tells_what_its_run_was(browser, place, recorded):
    with Ledger.open(recorded) as ledger:
        run = ledger.runs()[9]
    browser.open(place["run"])
    text = browser.js("document.body.innerText")
    for word in (run.commit, run.checkpoint, run.factors, run.reproduce, run.environment["torch"]):
        assert word in text
    # Its threads are twice those of the anchor: the one thing in the environment that differs.
    rows = browser.js(
        "[...document.querySelectorAll('[aria-label=\"Against the anchor\"] tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows == [["threads", "1", "2"]]
    browser.open(place["broken"])
    text = browser.js("document.body.innerText")
    assert "▲ diverges" in text and "First divergence: " in text and "Worst tokens" in text
