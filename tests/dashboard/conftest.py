"""Chromium without a window, over its debugging pipe, and the site of the recorded history."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.certify.certificate import Certificate, certify
from harness.certify.results import FaultRun, HealthyRun
from harness.dashboard import build
from harness.ledger.store import Ledger

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Space": (32, " "),
    "ArrowDown": (40, ""),
    "ArrowUp": (38, ""),
}
LONG = 90.0


class Browser:
    """One tab. Everything that a page logs, throws or asks for is kept in lists."""

    def __init__(self, home: Path) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, f"no browser: install Debian's package chromium (looked for {NAMES})"
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        words = [program, "--headless=new", "--remote-debugging-pipe", "--no-first-run"]
        words += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
        words += ["--disable-background-networking", "--disable-component-update"]
        words += [f"--user-data-dir={home}", "about:blank"]
        # The pipe is expected at the descriptors 3 and 4; only bash takes larger ones to move.
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{back}', *words]
        self._process = subprocess.Popen(
            shell,
            pass_fds=(there, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(home)},
        )
        os.close(there)
        os.close(back)
        self._buffer = b""
        self._count = 0
        self._session = ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.size(1280, 900)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)

    # -- the protocol --------------------------------------------------------------------------

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        asked = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        until = time.monotonic() + LONG
        while True:
            message = self._receive(until)
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            ready, _, _ = select.select([self._read], [], [], max(left, 0))
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has died"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, about: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            detail = about["exceptionDetails"]
            self.errors.append(detail.get("exception", {}).get("description", detail["text"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            self.errors.append(" ".join(str(a.get("value", a)) for a in about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    # -- what a person does --------------------------------------------------------------------

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a page from disk and wait until it says that it is ready."""
        self.errors.clear()
        self.requests.clear()
        # A fragment alone would not load the page anew.
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait("document.body && document.body.dataset.ready === 'yes'")

    def js(self, expression: str) -> Any:
        found = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        until = time.monotonic() + LONG
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < until, f"never true: {condition}; errors: {self.errors}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str, *, shift: bool = False) -> None:
        code, text = KEYS[name]
        about: dict[str, Any] = {"key": " " if name == "Space" else name, "code": name}
        about |= {"windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        for letter in text:
            self._call("Input.dispatchKeyEvent", type="char", text=letter)

    def tab_to(self, reached: str) -> None:
        """Press Tab until a condition on ``document.activeElement`` holds."""
        for _ in range(60):
            self.key("Tab")
            if self.js(f"Boolean((e => {reached})(document.activeElement))"):
                return
        raise AssertionError(f"Tab never reaches {reached}")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def dark(self, on: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, file: Path) -> None:
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        file.write_bytes(base64.b64decode(found["data"]))

    def run_script(self, file: Path) -> None:
        """Run a script in the page, whatever the page's own policy says of scripts."""
        self.js(file.read_text(encoding="utf-8") + "\n;0")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One tab for all tests of a worker."""
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate with a survivor, false alarms and rivals, counted from made-up runs."""
    rules = {"cosine >= 0.99": True, "allclose": False}
    fault = FaultRun(
        "a", None, "norm", "plain", False, "diverges", True, 0, "x", "x", "local", 5.0,
        {"local norm_1": 5.0}, rules=rules,
    )  # fmt: skip
    healthy = HealthyRun("w", "torch", "float16", 3, "conforms", "", 0.5, {}, rules)
    runs: list[FaultRun | HealthyRun] = [
        replace(fault, fault=f"{area}-{at}", area=area)
        for area in ("alibi", "mask", "norm", "weights")
        for at in range(5)
    ]
    runs.append(replace(fault, fault="sly", verdict="conforms"))
    runs += [replace(healthy, weights=f"w{at}") for at in range(9)]
    return certify(
        runs, target="llvm", dtype="float16", factors="f" * 64, stamp="s", sample="",
        versions={}, seeds=(0, 9),
    )  # fmt: skip


@pytest.fixture(scope="session")
def site(
    recorded: Path, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The dashboard of the history, with a gate that blocks and a waiver."""
    folder = tmp_path_factory.mktemp("site")
    with Ledger.open(recorded) as ledger:
        digest = ledger.runs()[0].checkpoint
    (folder / "gate.toml").write_text(
        f'schema = 1\n[[checkpoint]]\nname = "tiny"\ndigest = "{digest}"\n'
        '[[require]]\nsubject = "relax"\ntargets = ["llvm", "cuda"]\n'
        'dtypes = ["float16", "bfloat16"]\ncheckpoints = ["tiny"]\n'
        '[runs]\nfactors = "any"\ncommit = "any"\n'
    )
    (folder / "waivers").mkdir()
    (folder / "waivers" / "cuda.toml").write_text(
        'reason = "no runner yet"\nowner = "release manager"\nexpires = 2099-01-01\n'
        'check = "run"\nsubject = "relax"\ntarget = "cuda"\ndtype = "float16"\n'
        'checkpoint = "tiny"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "shipped_certificates", lambda: [certificate])
        build.build(str(recorded), folder / "site", folder / "gate.toml")
    return folder / "site"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: ``CONFORM_ARTEFACTS`` if a pipeline names a folder to keep."""
    kept = os.environ.get("CONFORM_ARTEFACTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
