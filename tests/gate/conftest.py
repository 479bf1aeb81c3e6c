"""Policies over the recorded history, and the command line in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.ledger.records import Run
from harness.ledger.store import Ledger

OWN = "examples.own_mpt:load"


@dataclass(frozen=True)
class Ran:
    """What one gate came to, in every form that it is written in."""

    code: int
    out: str
    err: str
    record: dict[str, Any]
    junit: ElementTree.Element
    markdown: str

    def findings(self, cell: int = 0) -> dict[str, dict[str, Any]]:
        return {found["check"]: found for found in self.record["cells"][cell]["findings"]}


@pytest.fixture(scope="session")
def runs(recorded: Path) -> tuple[Run, ...]:
    with Ledger.open(recorded) as ledger:
        return ledger.runs()


@pytest.fixture
def ledger(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the history, to be written."""
    return Path(shutil.copy(recorded, tmp_path / "ledger.db"))


@pytest.fixture
def policy(tmp_path: Path, runs: Sequence[Run]) -> Callable[..., Path]:
    """Writes ``gate.toml`` for cells (subject, target, dtype) on the first checkpoint."""

    def write(*cells: tuple[str, str, str], more: str = "", digest: str | None = None) -> Path:
        text = ["schema = 1", "[[checkpoint]]", 'name = "tiny"']
        text.append(f'digest = "{digest or runs[0].checkpoint}"')
        for subject, target, dtype in cells:
            text += ["[[require]]", f'subject = "{subject}"', f'targets = ["{target}"]']
            text += [f'dtypes = ["{dtype}"]', 'checkpoints = ["tiny"]']
        if "[runs]" not in more:
            more += '\n[runs]\nfactors = "any"\ncommit = "any"\n'
        place = tmp_path / "gate.toml"
        place.write_text("\n".join([*text, more]) + "\n")
        return place

    return write


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    from harness.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpt-conform", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def gate(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> Callable[..., Ran]:
    """Runs ``mpt-conform gate`` and reads back everything that it writes."""

    def run(policy: Path, ledger: object, *words: object) -> Ran:
        files = [tmp_path / name for name in ("gate.json", "gate.xml", "gate.md")]
        for file in files:
            file.unlink(missing_ok=True)
        forms = ("--json", files[0], "--junit", files[1], "--markdown", files[2])
        code, out, err = command(
            "gate", "--release", "1.0", "--policy", policy, "--ledger", ledger, *forms, *words
        )
        if not files[0].exists():
            pytest.fail(err)
        record = json.loads(files[0].read_text())
        return Ran(
            code, out, err, record, ElementTree.parse(files[1]).getroot(), files[2].read_text()
        )

    return run
