"""What identifies a run beyond its report: the code, the device, the limits, the certificate."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

_COMMIT_VARIABLES = ("MPT_CONFORM_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA")
_DRIVER = Path("/proc/driver/nvidia/version")


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


def run_id(at: datetime) -> str:
    """Return a name for a run: time to the second, and eight random digits."""
    return f"{at:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def commit() -> str:
    """Return the commit of the code in the current directory; empty if there is none.

    A pipeline says it in ``MPT_CONFORM_COMMIT`` (or GitHub's and GitLab's own variable); else git
    is asked, and changed files add ``-dirty``.
    """
    for name in _COMMIT_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    head = _git("rev-parse", "HEAD")
    if not head:
        return ""
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device(target: str, cpu: str) -> tuple[str, str]:
    """Return the names of the device and of its driver; a target on the CPU has no driver."""
    if "cuda" not in target:
        return cpu, ""
    import tvm

    card = tvm.cuda(0)
    name = str(card.device_name) if card.exist else "no device"
    try:
        driver = _DRIVER.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        driver = ""
    return name, " ".join(driver.removeprefix("NVRM version:").split())


def certificate(target: str) -> str:
    """Return the digest of the certificate that ships for a target; empty if there is none."""
    from harness.certify.certificate import read_certificate

    file = resources.files("harness.certify").joinpath(f"certificate-{target}.json")
    return read_certificate(file.read_bytes()).digest if file.is_file() else ""


def factors() -> str:
    """Return the digest of the safety factors."""
    from harness.judge.factors import FILE

    content = resources.files("harness.judge").joinpath(FILE).read_bytes()
    return hashlib.sha256(content).hexdigest()


def inputs(cases: Iterable[Any]) -> str:
    """Return the digest of every token id, in order, with the shapes of the cases."""
    found = hashlib.sha256()
    for case in cases:
        found.update(repr(case.ids.shape).encode())
        found.update(case.ids.astype("<i4").tobytes())
    return found.hexdigest()
