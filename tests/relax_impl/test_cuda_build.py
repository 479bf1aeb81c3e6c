"""Compilation for CUDA, which needs nvcc but no device."""

from __future__ import annotations

import subprocess

import pytest
import tvm

from relax_impl.compile import compile_model, pipeline
from relax_impl.config import MPTConfig
from relax_impl.graph import build_graph
from relax_impl.operations import PLAIN
from relax_impl.target import resolve

pytestmark = pytest.mark.cuda_build


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_kernel_is_accepted_by_nvcc(dtype, raw, tmp_path):
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True, "clip_qkv": 1}
    config = MPTConfig.from_dict(raw(attn, no_bias=False))
    target = resolve("cuda")
    with target:
        module = build_graph(config, dtype, lambda layer: PLAIN).module
    built = tvm.compile(
        module, target=target, relax_pipeline=pipeline(target), tir_pipeline="s_tir"
    )
    modules, sources = [built.mod], []
    while modules:
        module = modules.pop()
        modules.extend(module.imports)
        if module.kind == "cuda":
            sources.append(module.inspect_source())
    assert len(sources) == 1 and sources[0].count("__global__") > 10
    file = tmp_path / "kernels.cu"
    file.write_text(sources[0])
    command = ["nvcc", "-cubin", "-arch=sm_90", "-w", "-o", str(tmp_path / "kernels.cubin")]
    ran = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_library_is_made_without_a_device(raw):
    config = MPTConfig.from_dict(raw(n_layers=1))
    library = compile_model(config, "float16", "cuda")
    assert library.target == "cuda"
    assert library.path.read_bytes()[:4] == b"\x7fELF"
    assert compile_model(config, "float16", "cuda").cached
    assert (library.executable is None) == (not tvm.cuda(0).exist)
