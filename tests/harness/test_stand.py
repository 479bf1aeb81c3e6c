"""docs/stand.md, followed to the letter: what it tells to write is written, what to run is run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from harness.cli import main

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "stand.md"
STEPS = re.findall(r"^```(python|console)\n(.*?)^```$", HOW_TO.read_text(), re.M | re.S)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "mpt-conform"
    monkeypatch.setattr(sys, "argv", words)
    # A reader's second command is another process, which imports the file anew.
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_how_to_is_followed_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [kind for kind, _ in STEPS] == ["python", "console", "python", "console"]
    (_, file), (_, first), (_, mended), (_, second) = STEPS
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # No bytecode of the file's first state may answer for its second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    place = tmp_path / "mine.py"
    place.write_text(file)
    assert run(first.strip(), monkeypatch) == 1
    assert "logits" in capsys.readouterr().out
    body = r"    def slopes\(.*?\n(?=\n    def forward)"
    place.write_text(re.sub(body, lambda _: mended, file, flags=re.S))
    assert place.read_text() != file
    assert run(second.strip(), monkeypatch) == 0, capsys.readouterr()
