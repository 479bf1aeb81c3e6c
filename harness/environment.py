"""What a verdict depends on besides code and data."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "transformers", "numpy", "ml-dtypes")


def environment() -> dict[str, str]:
    """Return versions, machine and threads, without importing anything heavy."""
    result = {"python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu()}
    for package in ("mpt-conformance", *PACKAGES):
        try:
            result[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = "not installed"
    threads = os.environ.get("TVM_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    result["threads"] = threads or str(len(os.sched_getaffinity(0)))
    return result


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
