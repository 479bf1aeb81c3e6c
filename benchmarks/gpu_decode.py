"""Decode steps on a CUDA device: the port over its cache beside torch with a static cache.

Part of `gpu.py --decode`. Every sequence holds the same number of random keys and values, the same
for both. The peer is PyTorch's functions over a cache of fixed size, with SDPA under a bias, whose
whole step is one CUDA graph; the port is called as a deployment calls it, `extend` and `head`, and
once more with these two as one CUDA graph, captured as a deployment captures it. The position is
read on the device, so that one graph serves all steps: it is also replayed one token further back,
and must give the bits of the calls.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
Step = Callable[[torch.Tensor], torch.Tensor]
PANEL = 16
PAUSES = {"back-to-back": 0.0, "pauses of 100 ms": 0.1}


def caches(raw: dict[str, Any], batch: int, past: int) -> list[torch.Tensor]:
    """Keys and values of every layer, (batch, heads, slots, D) in turn; what is new is zero."""
    generator = torch.Generator("cuda").manual_seed(past)
    heads = raw["n_heads"]
    slots = -(-(past + 1) // PANEL) * PANEL
    made = []
    for _ in range(2 * raw["n_layers"]):
        shape = (batch, heads, slots, raw["d_model"] // heads)
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)
        values[:, :, past:] = 0
        made.append(values)
    return made


def in_torch(
    weights: Weights, raw: dict[str, Any], held: list[torch.Tensor], past: int, wide: bool
) -> Step:
    """One step by PyTorch's functions; `wide` widens to float32, a matrix at a time."""
    heads, d = raw["n_heads"], raw["d_model"]
    dtype = torch.float32 if wide else torch.float16
    at = torch.arange(held[0].shape[2], device="cuda")
    rates = torch.exp2(-torch.arange(1, heads + 1, device="cuda") * (8 / heads))
    bias = rates[:, None] * (at - past).float()
    bias = bias.masked_fill(at > past, -math.inf).to(dtype)[None, :, None]

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype)

    def step(ids: torch.Tensor) -> torch.Tensor:
        x = cast(weights["transformer.wte.weight"][ids[:, 0]])
        for layer in range(raw["n_layers"]):
            name = f"transformer.blocks.{layer}."
            y = F.layer_norm(x, (d,), cast(weights[name + "norm_1.weight"]))
            qkv = F.linear(y, cast(weights[name + "attn.Wqkv.weight"]))
            q, k, v = (t.reshape(len(x), heads, 1, d // heads) for t in qkv.chunk(3, -1))
            keys, values = held[2 * layer], held[2 * layer + 1]
            keys[:, :, past], values[:, :, past] = k[:, :, 0].half(), v[:, :, 0].half()
            y = F.scaled_dot_product_attention(q, cast(keys), cast(values), attn_mask=bias)
            x = x + F.linear(y.reshape(len(x), d), cast(weights[name + "attn.out_proj.weight"]))
            y = F.layer_norm(x, (d,), cast(weights[name + "norm_2.weight"]))
            y = F.gelu(F.linear(y, cast(weights[name + "ffn.up_proj.weight"])))
            x = x + F.linear(y, cast(weights[name + "ffn.down_proj.weight"]))
        x = F.layer_norm(x, (d,), cast(weights["transformer.norm_f.weight"]))
        return F.linear(x, cast(weights["transformer.wte.weight"]))

    return step


def graphed(step: Step, ids: torch.Tensor) -> Step:
    """Capture a step; its replays read the ids that are there."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(ids)

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def port(weights: Weights, raw: dict[str, Any], held: list[torch.Tensor], past: int) -> Step:
    """One step by the compiled functions of the port, over a copy of the caches."""
    import tvm
    from tvm import relax

    from relax_impl.compile import compile_model
    from relax_impl.config import MPTConfig

    library = compile_model(MPTConfig.from_dict(raw), "float16", "cuda")
    machine = relax.VirtualMachine(library.executable, tvm.cuda(0))
    given = tvm.runtime.from_dlpack
    own = []
    for index, tensor in enumerate(held):
        batch, heads, slots, dim = tensor.shape
        if index % 2 == 0:
            panels = tensor.reshape(batch, heads, slots // PANEL, PANEL, dim)
            own.append(panels.transpose(-1, -2).contiguous())
        else:
            own.append(tensor.clone())
    tensors = [given(tensor) for tensor in own]
    parameters = {
        name: [given(weights[n]) for n in library.functions[name].parameters]
        for name in ("extend", "head")
    }
    batch = held[0].shape[0]
    places = [torch.full((batch,), v, dtype=torch.int32, device="cuda") for v in (past, 0)]
    lengths, starts = map(given, places)
    extend, head = machine["extend"], machine["head"]

    def step(ids: torch.Tensor) -> torch.Tensor:
        stream = extend(given(ids), lengths, starts, *tensors, *parameters["extend"])
        return torch.from_dlpack(head(stream, *parameters["head"])[-1])[:, 0]

    step.keep = own  # type: ignore[attr-defined]
    step.lengths = places[0]  # type: ignore[attr-defined]
    return step


def port_graphed(step: Any, ids: torch.Tensor) -> tuple[Step, bool]:
    """Capture the port's step; also whether replays give the same bits at two positions."""
    import tvm

    from relax_impl.kernels.cuda.captured import Graph

    torch.cuda.synchronize()
    graph = Graph(tvm.cuda(0), lambda: step(ids))
    logits = graph.result

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.launch(torch.cuda.current_stream().cuda_stream)
        return logits

    # Further back a step writes over what the cache holds.
    held = [tensor.clone() for tensor in step.keep]
    same = True
    for back in (0, 1):
        step.lengths.sub_(back)
        called = step(ids).clone()
        replay(ids)
        torch.cuda.synchronize()
        same = same and torch.equal(called, logits)
        step.lengths.add_(back)
    for tensor, before in zip(step.keep, held, strict=True):
        tensor.copy_(before)
    return replay, same


def measure(
    weights: Weights, raw: dict[str, Any], pasts: list[int], batches: list[int], rounds: int
) -> dict[str, Any]:
    """Time steps behind caches of every size, for every batch; print a table."""
    from gpu import profile, timed

    result: dict[str, Any] = {}
    for batch in batches:
        for past in pasts:
            held = caches(raw, batch, past)
            ids = torch.arange(1, batch + 1, device="cuda", dtype=torch.int32)[:, None]
            exact = in_torch(weights, raw, [t.clone() for t in held], past, wide=True)(ids).float()
            copy = [t.clone() for t in held]
            called = port(weights, raw, held, past)
            again = port(weights, raw, held, past)
            replayed, same = port_graphed(again, ids)
            steps = {
                "port": called,
                "port, CUDA graph": replayed,
                "torch, static cache, CUDA graph": graphed(
                    in_torch(weights, raw, copy, past, wide=False), ids
                ),
            }
            one: dict[str, Any] = {"milliseconds": {}, "relative error of logits": {}}
            for name, step in steps.items():
                error = (step(ids).float() - exact).norm() / exact.norm()
                one["relative error of logits"][name] = float(f"{error.item():.3e}")
            for protocol, pause in PAUSES.items():
                many = rounds if pause else 4 * rounds
                one["milliseconds"][protocol] = {
                    name: timed(functools.partial(step, ids), many, pause)
                    for name, step in steps.items()
                }
            one["a graph's bits are those of calls"] = same
            one["host milliseconds"] = {}
            for name in ("port", "port, CUDA graph"):
                begun = time.perf_counter()
                for _ in range(5):
                    steps[name](ids)
                one["host milliseconds"][name] = round((time.perf_counter() - begun) * 200, 3)
                torch.cuda.synchronize()
            one["kernels of the port"] = profile(steps["port"], ids)
            result[f"batch {batch}, past {past}"] = one
            print(f"\ndecode, batch {batch}, {past} tokens in the cache")
            for name in steps:
                row = ", ".join(f"{p} {one['milliseconds'][p][name]}" for p in PAUSES)
                print(f"  {name}: {row}, error {one['relative error of logits'][name]:.2e}")
            print(f"  host: {one['host milliseconds']} ms, bits of graph and calls equal: {same}",
                  flush=True)  # fmt: skip
            for name, kernel in list(one["kernels of the port"].items())[:10]:
                print(f"  {kernel['microseconds']:>9} us {kernel['calls']:>4} calls  {name[:80]}")
            del steps, held, copy, called, again, replayed
            torch.cuda.empty_cache()
    return result
