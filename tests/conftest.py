"""What holds for every test: Hypothesis' profiles, and that nothing passes without having run."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]

NOT_PROVEN = 3

# Numerical examples take as long as they take: a deadline would measure the machine.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("dev")


HISTORY = pathlib.Path(__file__).parents[1] / "examples" / "history"


@pytest.fixture(scope="session")
def small_config() -> dict[str, Any]:
    """The model of `examples/history`; the folder is read, for no test may import from it."""
    read: dict[str, Any] = json.loads((HISTORY / "config.json").read_text())
    return read


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A ledger with the runs of `examples/history`, really made once; not to be written."""
    from harness.ledger.exchange import take_in

    place = tmp_path_factory.mktemp("recorded") / "ledger.db"
    take_in(HISTORY / "tables", str(place))
    return place


def lacks_device() -> str | None:
    try:
        import tvm
    except ImportError as error:
        return f"no CUDA device (TVM cannot be imported: {error})"
    return None if tvm.cuda(0).exist else "no CUDA device (TVM sees none)"


def lacks_compiler() -> str | None:
    return None if shutil.which("nvcc") else "no CUDA compiler (nvcc is not on PATH)"


def lacks_peer(*names: str) -> Callable[[], str | None]:
    """Say what a peer's test cannot do without."""

    def lacks() -> str | None:
        from harness.subjects.peers.registry import PEERS

        missing = [name for peer in names for name in PEERS[peer].missing]
        return f"not installed: {', '.join(missing)}" if missing else None

    return lacks


LACKS: dict[str, Callable[[], str | None]] = {
    "gpu": lacks_device,
    "cuda_build": lacks_compiler,
    "peers": lacks_peer("ctranslate2", "onnxruntime", "openvino"),
    "llama_cpp": lacks_peer("llama-cpp"),
    "foundry": lacks_peer("llm-foundry"),
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """End the session when a selected test needs what this machine lacks."""
    if session.config.option.collectonly:
        return
    for marker, lacks in LACKS.items():
        selected = sum(item.get_closest_marker(marker) is not None for item in session.items)
        lacking = lacks() if selected else None
        if lacking:
            pytest.exit(
                f"not proven: {lacking}; {selected} selected test(s) marked {marker} cannot run",
                returncode=NOT_PROVEN,
            )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Neither a skipped test nor an empty selection proves anything."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = len(reporter.stats.get("skipped", ()))
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        sentence = "no test was selected"
    elif session.exitstatus == pytest.ExitCode.OK and skipped:
        sentence = f"{skipped} test(s) skipped"
    else:
        return
    reporter.write_line(f"\nnot proven: {sentence}")
    session.exitstatus = NOT_PROVEN
