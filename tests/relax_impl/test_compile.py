"""The cache of libraries, the passes around the kernels, and the target."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script.parser.core.parser import ScriptMacro

from relax_impl.compile import OBJECTS, cache_directory, cache_key, compile_model, pipeline
from relax_impl.config import MPTConfig
from relax_impl.graph import build_graph
from relax_impl.kernels.cpu import FAST
from relax_impl.kernels.cpu.linear import linear_kernel
from relax_impl.kernels.cpu.rowwise import norm_kernel
from relax_impl.kernels.parsing import quick_inlining
from relax_impl.operations import PLAIN, gelu
from relax_impl.target import resolve, use_all_cores, wide_vectors

TINY = {
    "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 32, "max_seq_len": 8, "no_bias": True,
    "attn_config": {"alibi": True},
}  # fmt: skip
CONFIG = MPTConfig.from_dict(TINY)
IDS = np.array([[1, 2, 3]])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mpt-conformance"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good library, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("whole")))
        return compile_plain()


def compile_plain(**changes):
    ops = dataclasses.replace(PLAIN, **changes)
    return compile_model(CONFIG, "float32", "llvm", lambda layer: ops)


def files(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != OBJECTS)


def test_a_library_is_compiled_once(cache):
    first = compile_plain()
    second = compile_plain()
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path and first.path.parent == cache == cache_directory()
    # The library and its digest; nothing unfinished.
    assert files(cache) == [first.path.stem + ".sha256", first.path.name]


def test_another_process_finds_it(cache):
    first = compile_plain()
    code = (
        "import json, sys; from relax_impl.compile import compile_model;"
        "from relax_impl.config import MPTConfig; from relax_impl.operations import PLAIN;"
        "config = MPTConfig.from_dict(json.loads(sys.argv[1]));"
        "library = compile_model(config, 'float32', 'llvm', lambda layer: PLAIN);"
        "print(library.cached, library.path)"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TINY)],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["True", str(first.path)]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "emptied", "no digest", "wrong digest"])
def test_a_damaged_library_is_compiled_anew(damage, cache, whole, build):
    path = shutil.copytree(whole.path.parent, cache) / whole.path.name
    copied = compile_plain()
    assert copied.cached and copied.path == path
    seal, content = path.with_suffix(".sha256"), path.read_bytes()
    # A new file: this process has the old one mapped.
    path.unlink()
    path.write_bytes(content)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "no digest":
        seal.unlink()
    else:
        seal.write_bytes(b"\xff" * 64)
    again = compile_plain()
    assert not again.cached
    assert compile_plain().cached
    assert build(TINY, "float32", lambda layer: PLAIN).model.forward(IDS).shape == (1, 3, 32)


def test_whatever_decides_the_result_is_in_the_key():
    def key(dtype="float32", target="llvm", ops=PLAIN, config=CONFIG, **changes):
        changed = dataclasses.replace(ops, **changes)
        return cache_key(build_graph(config, dtype, lambda layer: changed).module, resolve(target))

    keys = [
        key(),
        key("float16"),
        key(target='{"kind": "llvm"}'),
        key(ops=FAST),
        key(activation=lambda x: gelu(gelu(x))),
        key(slopes=lambda config: np.float32([0.5, 0.25])),
        key(config=dataclasses.replace(CONFIG, layer_norm_epsilon=2e-5)),
        key(config=dataclasses.replace(CONFIG, softmax_scale=0.5)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_what_a_process_did_before_is_not_in_the_key():
    """Equal nodes may be one object or two: the JSON of a module tells, its key must not."""
    module = build_graph(CONFIG, "float32", lambda layer: PLAIN).module
    kernel = next(f for _, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    twin = tvm.ir.load_json(tvm.ir.save_json(kernel))
    shared, apart = tvm.IRModule({"a": kernel, "b": kernel}), tvm.IRModule({"a": kernel, "b": twin})
    assert tvm.ir.save_json(shared) != tvm.ir.save_json(apart)
    target = resolve("llvm")
    assert cache_key(shared, target) == cache_key(apart, target)
    assert cache_key(shared, target) != cache_key(tvm.IRModule({"a": kernel}), target)


def test_a_failed_compilation_leaves_nothing(cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tvm.runtime.Executable, "export_library", fail)
    with pytest.raises(OSError, match="disk full"):
        compile_plain()
    assert files(cache) == []


def kernel_headers(passes):
    """Definition lines of what computes the head: functions over the plain arguments of a kernel.

    The head alone, because only the last function of a module, in order of names, decides for all
    of them: here it is the one that computes shapes.
    """
    target = resolve("llvm")
    with target:
        module = build_graph(CONFIG, "float32", lambda layer: FAST).module
    module = relax.transform.DeadCodeElimination(["head"])(module)
    for name in ("embed", "block", "attend", "forward", "extend", "last"):
        del module[name]
    module = relax.transform.DeadCodeElimination(["head"])(module)
    built = tvm.compile(module, target=target, relax_pipeline=passes, tir_pipeline="s_tir")
    modules, texts = [built.mod], []
    while modules:
        module = modules.pop()
        modules.extend(module.imports)
        if module.kind == "llvm":
            texts.append(module.inspect_source("ll"))
    lines = "\n".join(texts).splitlines()
    return [line for line in lines if line.startswith("define") and "_compute_(" in line]


def test_kernels_keep_noalias_next_to_the_shape_function():
    target = resolve("llvm")
    kept = kernel_headers(pipeline(target))
    linear = [line for line in kept if "@linear_compute_(" in line]
    assert len(linear) == 1 and linear[0].count("ptr noalias") == linear[0].count("ptr ") == 3
    # The trap is still there: without the pass the compiler drops it. If it no longer does, nor
    # need the pass be.
    trapped = kernel_headers(relax.pipeline.get_default_pipeline(target))
    assert [line for line in trapped if "ptr noalias" in line] == []


def test_the_host_is_more_than_its_architecture():
    target = resolve("llvm")
    features = [str(feature) for feature in target.attrs["mattr"]]
    assert str(target.attrs["mcpu"]) not in ("", "generic")
    assert features
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is not None:
        for feature in ("f16c", "fma", "avx2", "avx512f"):
            assert (f"+{feature}" in features) == (feature in flags)


@pytest.mark.parametrize(
    ("processor", "more", "register", "fused"),
    [
        ({"mcpu": "skylake-avx512"}, True, "zmm", "vfmadd"),
        ({"mcpu": "znver3", "mattr": ["+avx512f"]}, True, "zmm", "vfmadd"),
        ({"mcpu": "znver4", "mattr": ["-avx512f"]}, False, "ymm", "vfmadd"),
        ({"mcpu": "haswell"}, False, "ymm", "vfmadd"),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"}, False, "v0.4s", "fmla"),
    ],
)
def test_vectors_are_as_wide_as_the_processor_has_them(processor, more, register, fused):
    """Compiled only: what this machine lacks is not run."""
    target = tvm.target.Target({"kind": "llvm", **processor})
    with target:
        assert wide_vectors() == more
        kernel = linear_kernel(32, 512, "float32", "float32", False, wide_vectors())
    module = tvm.IRModule({"k": kernel.with_attr("global_symbol", "k")})
    built = tvm.compile(module, target=target, tir_pipeline="s_tir")
    assembly = built.mod.inspect_source("asm")
    assert fused in assembly and register in assembly
    assert ("zmm" in assembly) == more


def test_parsing_quickly_gives_the_same_kernel():
    arguments = (24, "float32", 1e-5, False, True)
    slow = norm_kernel.__wrapped__(*arguments)
    finder = ScriptMacro._find_parser_def
    with quick_inlining():
        assert ScriptMacro._find_parser_def is not finder
        quick = norm_kernel.__wrapped__(*arguments)
    assert ScriptMacro._find_parser_def is finder
    tvm.ir.assert_structural_equal(slow, quick)


def test_targets_that_are_none_are_refused():
    with pytest.raises(ValueError, match="expected llvm, cuda or a TVM target as JSON"):
        resolve("llvmm")
    with pytest.raises(ValueError, match="dtype: expected one of"):
        compile_model(CONFIG, "float64")


def test_threads_are_the_cores_unless_the_user_chose(monkeypatch):
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    use_all_cores()
    assert os.environ["TVM_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("TVM_NUM_THREADS", "77")
    use_all_cores()
    assert os.environ["TVM_NUM_THREADS"] == "77"
    monkeypatch.delenv("TVM_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    use_all_cores()
    assert "TVM_NUM_THREADS" not in os.environ
