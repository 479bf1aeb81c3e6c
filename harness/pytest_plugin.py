"""``pytest --conform-target cuda --conform-ledger FILE``: a check as test items, one a chapter.

The items come with the option, without a test of one's own: ``pytest --conform-target llvm -k
alibi`` runs the ALiBi chapter. What needs a check shares it: within a process, and among the
workers of pytest-xdist, so that the ledger gets one run for each target and dtype.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NOT_PROVEN = 3
_STATE = "conform_state"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; without ``--conform-target`` nothing else happens."""
    group = parser.getgroup("conform", "MPT conformance")
    group.addoption("--conform-target", action="append", default=[], help="llvm or cuda; repeat")
    group.addoption("--conform-dtype", action="append", default=[], help="storage dtype; repeat")
    group.addoption("--conform-subject", default="relax", help="as mpt-conform check --subject")
    group.addoption("--conform-checkpoint", type=Path, help="the shipped one by default")
    group.addoption("--conform-prompts", help="as mpt-conform check --prompts")
    group.addoption("--conform-fault", help="plant a fault: then the items must fail")
    group.addoption("--conform-ledger", help="add the runs to this ledger: file or database URL")


@dataclass(frozen=True)
class Wanted:
    """One check, as the options ask for it."""

    target: str
    dtype: str
    subject: str
    checkpoint: Path
    prompts: str | None
    fault: str | None
    ledger: str | None

    @property
    def name(self) -> str:
        """Its name in the ids of the items, and of its files."""
        return f"{self.target}-{self.dtype}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the items, before -k and -m choose among all."""
    if not config.option.conform_target:
        return
    from harness.pipeline import SHIPPED, open_material

    option = config.option
    checkpoint = option.conform_checkpoint or SHIPPED
    try:
        material = open_material(checkpoint)
    except Exception as error:
        raise pytest.UsageError(str(error)) from error
    added: list[pytest.Item] = []
    for target in option.conform_target:
        for dtype in option.conform_dtype or ["float16"]:
            wanted = Wanted(
                target,
                dtype,
                option.conform_subject,
                checkpoint,
                option.conform_prompts,
                option.conform_fault,
                option.conform_ledger,
            )
            for chapter in chapters(material.config):
                name = f"conform[{wanted.name}-{chapter}]"
                made = ChapterItem.from_parent(session, name=name, wanted=wanted, chapter=chapter)
                added.append(made)
    items += added
    # Whoever counts what was collected has to hear of these, too.
    told = pytest.CollectReport("conform", "passed", None, list(added))
    config.hook.pytest_collectreport(report=told)


def chapters(config: Any) -> list[str]:
    """Return the chapters that a config demands, in order of evaluation."""
    first = ["alibi"] if config.alibi else []
    layers = [f"layer-{layer}" for layer in range(config.n_layers)]
    return ["tensors", "ends", *first, *layers, "deployed", "coverage"]


def chapter_of(tap: dict[str, Any]) -> str:
    """Return the chapter of one tap in one mode."""
    if tap["mode"] in ("alibi", "deployed"):
        return str(tap["mode"])
    return "ends" if tap["layer"] is None else f"layer-{tap['layer']}"


class Diverges(Exception):
    """A chapter beyond its limits; the text says all."""


class Unproven(Exception):
    """A chapter about which nothing is known."""


class ChapterItem(pytest.Item):
    """One chapter of one check."""

    def __init__(self, *, wanted: Wanted, chapter: str, **more: Any) -> None:
        super().__init__(**more)
        self._wanted = wanted
        self._chapter = chapter

    def runtest(self) -> None:
        """Get the report, and hold this chapter of it against its limits."""
        judge(_report(self.config, self._wanted), self._chapter)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """Show what was found and how to repeat it, and no traceback of ours."""
        if isinstance(excinfo.value, Diverges | Unproven):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return where the item comes from: the options."""
        return self.config.rootpath, None, self.name


def judge(report: dict[str, Any], chapter: str) -> None:
    """Raise unless a chapter of a report conforms.

    Raises
    ------
    Diverges
        With value, limit, margin, place and the command that repeats it.
    Unproven
        If nothing was compared, or less than expected.
    """
    again = f"repeat with: {report['reproduce']}"
    if chapter == "tensors":
        lost = [f"{t['tensor']}: {t['detail']}" for t in report["tensors"] if not t["arrived"]]
        lost += [f"{f['tap']}: {f['reason']}" for f in report["failures"] if f["tap"] == "load"]
        if lost:
            raise Diverges("\n".join([*lost, again]))
        if not report["tensors"] and "parameters" not in report["subject"]["lacks"]:
            raise Unproven(f"not proven: no tensor was compared\n{again}")
        return
    if chapter == "coverage":
        if report["verdict"] == "not-proven":
            raise Unproven(f"not proven: {report['reason']}\n{again}")
        return
    mine = [tap for tap in report["taps"] if chapter_of(tap) == chapter]
    failed = [f for f in report["failures"] if chapter in (_chapter_of_path(f["tap"]), f["tap"])]
    lines = [f"{f['tap']}, case {f['case']!r}: {f['reason']}" for f in failed]
    lines += [sentence(tap) for tap in mine if tap["verdict"] != "conforms"]
    if lines:
        raise Diverges("\n".join([*lines, again]))
    if not mine:
        raise Unproven(f"not proven: nothing of {chapter} was compared\n{again}")


def _chapter_of_path(path: str) -> str:
    _, found, rest = path.partition("transformer.blocks.")
    if found:
        return f"layer-{rest.partition('.')[0]}"
    return {"alibi": "alibi", "logits": "deployed", "load": "tensors"}.get(path, "ends")


def sentence(tap: dict[str, Any]) -> str:
    """Return what is wrong at a tap: place, value, limit and margin."""
    if tap["ratio"] is None or tap["observed"] is None or tap["limit"] is None:
        return f"{tap['tap']} ({tap['mode']}, case {tap['case']!r}): not finite {tap['note']}"
    margin = 100 * (1 - tap["ratio"])
    return (
        f"{tap['tap']} ({tap['mode']}, case {tap['case']!r}): {tap['statistic']} "
        f"{tap['observed']:.3g}, limit {tap['limit']:.3g}, margin {margin:.3g} % "
        "(units of expected rounding noise)"
    )


# -- one check for all who need it -------------------------------------------------------------

_reports: dict[Wanted, dict[str, Any]] = {}


def _report(config: pytest.Config, wanted: Wanted) -> dict[str, Any]:
    if wanted not in _reports:
        shared = _shared_folder(config)
        _reports[wanted] = _make(wanted) if shared is None else _make_once(wanted, shared)
    found = _reports[wanted]
    if "unproven" in found:
        raise Unproven(found["unproven"])
    if "refused" in found:
        raise Diverges(found["refused"])
    return found


_FOLDER = pytest.StashKey[str]()
_INPUT = "conform_folder"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the workers of pytest-xdist a folder to share; the session that starts them asks."""
    if node.config.option.conform_target:
        if _FOLDER not in node.config.stash:
            node.config.stash[_FOLDER] = tempfile.mkdtemp(prefix="mpt-conform-")
        node.workerinput[_INPUT] = node.config.stash[_FOLDER]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Clear away what the workers shared."""
    if _FOLDER in config.stash:
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


def _shared_folder(config: pytest.Config) -> Path | None:
    """Return a folder that the workers of this session share; ``None`` without workers."""
    found = getattr(config, "workerinput", {}).get(_INPUT)
    return None if found is None else Path(found)


def _make_once(wanted: Wanted, folder: Path) -> dict[str, Any]:
    import fcntl

    done = folder / f"{wanted.name}.json"
    with (folder / f"{wanted.name}.lock").open("w") as lock:
        # Whoever comes first makes it; the others wait here and find it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(json.dumps(_make(wanted)), encoding="utf-8")
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def _make(wanted: Wanted) -> dict[str, Any]:
    from harness.errors import ConformanceError, NotProven
    from harness.ledger.record import check_into
    from harness.ledger.store import Ledger
    from harness.pipeline import Request, check
    from harness.report.files import plain

    request = Request(
        checkpoint=wanted.checkpoint,
        subject=wanted.subject,
        dtype=wanted.dtype,
        target=wanted.target,
        prompts=wanted.prompts,
        fault=wanted.fault,
        # A name for the fault takes longer than all the rest; the command in the failure gives it.
        diagnose=False,
    )
    try:
        if wanted.ledger is None:
            report = check(request)
        else:
            with Ledger.open(wanted.ledger, write=True) as ledger:
                report = check_into(ledger, request)
    except NotProven as error:
        return {"unproven": f"not proven: {error}"}
    except ConformanceError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = plain(report)
    return found


# -- the outcome of a session ------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """Note on the report of an item of ours why it failed; xdist carries that along."""
    report: Any = yield
    if isinstance(item, ChapterItem) and call.excinfo is not None:
        unproven = isinstance(call.excinfo.value, Unproven)
        setattr(report, _STATE, "not-proven" if unproven else "diverges")
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End with 3 where all that is red is "not proven"."""
    config = session.config
    if not config.option.conform_target or hasattr(config, "workerinput"):
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    failed = reporter.stats.get("failed", []) if reporter is not None else []
    if failed and all(getattr(report, _STATE, "") == "not-proven" for report in failed):
        session.exitstatus = NOT_PROVEN
