"""Kernels are compiled one by one, once, and linked into what a whole compilation gives."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from relax_impl import objects
from relax_impl.compile import OBJECTS, compile_model, pipeline
from relax_impl.config import MPTConfig
from relax_impl.graph import build_graph
from relax_impl.kernels.cpu import FAST
from relax_impl.objects import link
from relax_impl.operations import gelu
from relax_impl.target import resolve, threads

TINY = {
    "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 48, "max_seq_len": 8, "no_bias": True,
    "attn_config": {"alibi": True},
}  # fmt: skip
CONFIG = MPTConfig.from_dict(TINY)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mpt-conformance" / OBJECTS


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that are compiled."""
    names = []
    build = tirx.build

    def counted(module, **options):
        names.extend(variable.name_hint.rpartition("_")[0] for variable in module.functions)
        return build(module, **options)

    monkeypatch.setattr(objects.tirx, "build", counted)
    return names


def twice(x):
    return gelu(gelu(x))


def compile_with(**changes):
    ops = dataclasses.replace(FAST, **changes)
    return compile_model(CONFIG, "float16", "llvm", lambda layer: ops)


def test_what_two_models_share_is_compiled_once(cache, compiled):
    compile_with()
    first = list(compiled)
    assert len(first) == len(list(cache.glob("*.o")))
    compiled.clear()
    assert not compile_with(activation=twice).cached
    # The activation, its own operator chain; nothing of attention, products and norms.
    assert compiled and set(compiled).isdisjoint(
        {"attention", "cached_attention", "linear", "norm"}
    )
    assert len(compiled) < len(first) / 2


def test_damaged_objects_are_compiled_anew(cache, compiled):
    library = compile_with()
    first = sorted(compiled)
    for path in cache.glob("*.o"):
        path.write_bytes(path.read_bytes()[:-100])
    library.path.unlink()
    compiled.clear()
    compile_with()
    assert sorted(compiled) == first


def test_a_failed_object_leaves_nothing(cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tvm.runtime.Module, "write_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        compile_with()
    assert list(cache.iterdir()) == [] and list(cache.parent.glob("*.so")) == []


def test_the_bits_are_those_of_a_whole_compilation(tmp_path):
    target = resolve("llvm")
    with target:
        module = build_graph(CONFIG, "float16", lambda layer: FAST).module
    whole = tvm.compile(
        module, target=target, relax_pipeline=pipeline(target), tir_pipeline="s_tir"
    )
    path = tmp_path / "linked.so"
    link(module, target, pipeline(target), path, tmp_path / "objects")
    machines = [
        relax.VirtualMachine(executable, tvm.cpu())
        for executable in (whole, tvm.runtime.load_module(str(path)))
    ]
    rng = np.random.default_rng(0)
    block = module["block"]
    arguments = [
        tvm.runtime.tensor(rng.standard_normal(shape).astype("float16"))
        for shape in (
            [int(n) if isinstance(n, tirx.IntImm) else 3 for n in parameter.ty.shape]
            for parameter in block.params
        )
    ]
    for one, other in zip(*(machine["block"](*arguments) for machine in machines), strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"TVM_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"TVM_NUM_THREADS": "0"}, None),
    ],
)
def test_as_many_threads_as_the_user_allows(said, expected, monkeypatch):
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert threads() == (expected or len(os.sched_getaffinity(0)))


def test_two_processes_may_fill_one_cache(cache):
    code = (
        "import json, sys; from relax_impl.compile import compile_model;"
        "from relax_impl.config import MPTConfig;"
        f"compile_model(MPTConfig.from_dict({TINY!r}), 'float16')"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert compile_model(CONFIG, "float16").cached
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
