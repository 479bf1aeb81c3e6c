"""Kernels for Hopper as far as they can be judged without a device."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
import tvm
from tvm import relax

from relax_impl.compile import default_operations, default_roundings
from relax_impl.config import MPTConfig
from relax_impl.graph import build_graph
from relax_impl.kernels.cuda import FAST
from relax_impl.kernels.cuda.attention import Flash
from relax_impl.kernels.cuda.gemm import SHARED, Gemm
from relax_impl.kernels.cuda.library import names, wgmma_target
from relax_impl.kernels.cuda.norm import Norm
from relax_impl.kernels.cuda.past import OverPast
from relax_impl.operations import PLAIN
from relax_impl.target import resolve

MOST_SHARED = 232448 - 1024
"""Bytes a block may have on compute capability 9.0, less what the driver keeps."""


def calls(raw, dtype, **changes):
    config = MPTConfig.from_dict(raw(**{"d_model": 96} | changes))
    with resolve("cuda"):
        return names(build_graph(config, dtype, lambda layer: FAST).module)


def test_hopper_gets_its_kernels_and_others_what_is_portable():
    older = '{"kind": "cuda", "arch": "sm_80"}'
    assert default_operations("cuda") is FAST
    assert default_operations(older) is PLAIN


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_heavy_operation_calls_a_kernel(raw, dtype):
    found = " ".join(calls(raw, dtype, vocab_size=64))
    for part in ("_norm_", "_gelu_", "_residual_", "_attention_", "float32"):
        assert part in found


def test_float32_calls_none(raw):
    assert calls(raw, "float32") == ()


def test_float32_takes_roots_and_means_rounded_to_nearest(raw):
    config = MPTConfig.from_dict(raw(n_layers=1))
    target = resolve("cuda")
    with target:
        module = build_graph(config, "float32", lambda layer: FAST).module
    module = relax.transform.LegalizeOps()(module)
    text = module.script(show_meta=False)
    assert "__frsqrt_rn" in text and "__fdiv_rn" in text
    # What `--use_fast_math` would turn into an approximation.
    assert "T.rsqrt" not in text and "T.sqrt" not in text


def test_an_odd_width_is_left_to_the_portable_product(raw):
    even, odd = calls(raw, "float16", vocab_size=64), calls(raw, "float16", vocab_size=61)
    assert [name for name in even if "float32" in name]
    assert not [name for name in odd if "float32" in name]


def test_the_declared_roundings_are_those_of_the_kernels(raw):
    config = MPTConfig.from_dict(raw(d_model=96))
    half = default_roundings(config, "float16", "cuda")
    single = default_roundings(config, "float32", "cuda")
    assert (half["probabilities"], single["probabilities"]) == ("storage", "float32")
    assert half["residual"] == half["activation"] == "fused"
    assert (half["accumulator"], single["accumulator"]) == ("float32_cut", "float32")


def test_shared_memory_suffices():
    widest = Flash(2, 2, 128, "float16", 1.0, True, (768,) * 3, (0, 256, 512))
    assert max(SHARED, widest.shared_bytes()) <= MOST_SHARED


@pytest.mark.cuda_build
def test_nvcc_keeps_all_in_registers(tmp_path):
    kernels = {
        "wide": Gemm(512, 256, "float16", "float16", bias=True, clip=1.0, gelu=True),
        "logits": Gemm(512, 256, "bfloat16", "float32"),
        "stream": Gemm(512, 256, "float16", "float16", residual=True),
        "norm": Norm(4096, "float16", 1e-5, False, True),
        "long": Flash(2, 2, 128, "float16", 0.1, True, (768,) * 3, (0, 256, 512)),
        "decode": OverPast(2, 2, 128, "float16", 0.1, True, (768,) * 3, (0, 256, 512)),
        "odd": Flash(2, 1, 112, "bfloat16", 0.1, False, (224, 112, 112), (0, 0, 0)),
    }
    module = tvm.IRModule({name: kernel(name) for name, kernel in kernels.items()})
    target = wgmma_target(resolve("cuda"))
    built = tvm.compile(module, target=target, tir_pipeline="tirx")
    file = tmp_path / "kernels.cu"
    file.write_text(built.mod.imports[0].inspect_source())
    command = ["nvcc", "-cubin", "-w", "-std=c++17", "-Xptxas", "-v"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "kernels.cubin")]
    ran = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    report = ran.stdout + ran.stderr
    spilled = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(spilled) == len(kernels) and not any(spilled), report
    # The compiler says so when it cannot let matrix products overlap.
    assert "C7510" not in report and "serialized" not in report


def over_a_past(raw, operations=FAST, dtype="float16", attn=None, **changes):
    """Kernels that `extend` calls."""
    config = MPTConfig.from_dict(raw(attn, **{"d_model": 96} | changes))
    with resolve("cuda"):
        return [
            name
            for name in names(build_graph(config, dtype, lambda layer: operations).module)
            if name.startswith("mpt_past_")
        ]


def test_a_past_has_a_kernel(raw):
    assert over_a_past(raw)
    assert over_a_past(raw, attn={"qk_ln": True})
    # Of 8 features, for which there is no flash attention.
    assert over_a_past(raw, n_heads=12)
    assert not over_a_past(raw, dtype="float32")
    assert not over_a_past(raw, d_model=36, n_heads=6)


def test_a_fault_over_the_past_is_never_passed_over(raw):
    from harness.faults import alibi, mask, paths

    seen = 0
    for fault in (*paths.FAULTS, *alibi.FAULTS, *mask.FAULTS):
        if fault.operations is None:
            continue
        faulty = fault.operations(FAST)
        left = {"positions_after", "slopes"}
        changed = {f for f in vars(FAST) if getattr(FAST, f) != getattr(faulty, f)}
        own = isinstance(faulty.attention, type(FAST.attention))
        if changed <= left or not own:
            continue
        seen += 1
        scaled = faulty.cached == FAST.cached and faulty.attention == dataclasses.replace(
            FAST.attention, scale=faulty.attention.scale
        )
        wired = changed.isdisjoint({"block", "split", "split_heads", "merge_heads"})
        assert bool(over_a_past(raw, faulty)) == (scaled and wired), fault.name
    assert seen > 30


def test_another_sum_of_the_stream_sees_products_that_are_not_rounded(raw):
    commuted = dataclasses.replace(FAST, residual=lambda x, update: FAST.residual(update, x))
    config = MPTConfig.from_dict(raw(d_model=96, n_layers=1, vocab_size=64))
    with resolve("cuda"):
        found = names(build_graph(config, "float16", lambda layer: commuted).module)
    # Both products of the block, and the logits; the rounded ones are taps.
    wide = [name for name in found if name.startswith("mpt_gemm_float16_float32_96x")]
    assert len(wide) == 2
    assert not [name for name in found if "_residual_" in name]
