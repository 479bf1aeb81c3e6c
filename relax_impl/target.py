"""Targets: what a name stands for on this machine, and how many threads it gets."""

from __future__ import annotations

import json
import os

import tvm
from tvm.target import Target

HOPPER = {
    "kind": "cuda",
    # Not sm_90a, which the tensor-core schedule does not recognise.
    "arch": "sm_90",
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 232448,
    "max_num_threads": 1024,
    "thread_warp_size": 32,
    "registers_per_block": 65536,
}


def use_all_cores() -> None:
    """Let the runtime use every core; its own default is half of them.

    Only has an effect before the runtime's first parallel call, and leaves alone what the user set.
    """
    if "TVM_NUM_THREADS" not in os.environ and "OMP_NUM_THREADS" not in os.environ:
        os.environ["TVM_NUM_THREADS"] = str(threads())


def threads() -> int:
    """Return how many threads the user lets the runtime have; all cores where nothing is said."""
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        said = os.environ.get(name, "")
        if said.isdecimal() and int(said):
            return int(said)
    return len(os.sched_getaffinity(0))


def host() -> Target:
    """The machine this runs on, with every instruction set it has.

    A bare ``llvm`` target means the oldest processor of the architecture: no F16C, no FMA.
    """
    name = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    features = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    # A virtual machine may hide some of what the processor's name promises.
    found = sorted(("+" if on else "-") + str(feature) for feature, on in features.items())
    return Target({"kind": "llvm", "mcpu": name, "mattr": found})


def resolve(target: str) -> Target:
    """Resolve ``llvm``, ``cuda``, or a TVM target written as JSON, with its host.

    Raises
    ------
    ValueError
        The name is none of these.
    """
    if target == "llvm":
        return host()
    if target == "cuda":
        return Target(HOPPER, host=host())
    if target.startswith("{"):
        parsed = Target(json.loads(target))
        return parsed if parsed.host or parsed.kind.name == "llvm" else Target(parsed, host=host())
    raise ValueError(f"target: expected llvm, cuda or a TVM target as JSON, found {target!r}")


def is_hopper(target: Target) -> bool:
    """Whether the target has the instructions of compute capability 9.0."""
    return target.kind.name == "cuda" and str(target.attrs["arch"]) in ("sm_90", "sm_90a")


def wide_vectors() -> bool:
    """Whether the current target has registers of 512 bits, by its features or its processor."""
    target = Target.current(allow_none=True)
    if target is None or target.kind.name != "llvm":
        return False
    return bool(tvm.get_global_func("target.target_has_feature")("avx512f", target))
