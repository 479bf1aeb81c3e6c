"""Prefill of an MPT of the 7B shape on a CUDA device: the port beside what PyTorch offers.

    python benchmarks/gpu.py [--layers 32] [--lengths 2048] [--rounds 12] [--peers NAMES]
                             [--batch 1] [--decode [128 1023 2047]] [--output FILE.json]

Weights are random, of realistic scales, float16, the same tensors for all. Every implementation
returns all logits. Times are medians between events of the device, with runs back to back and with
pauses of 100 ms: the card throttles on power, so the two differ. The implementations take turns.
Errors are relative, over all logits, against float32 with the same weights. A profile of one run
says which kernels of the port take the time. The result is a table and, with --output, JSON.

With --decode, one token behind a cache of so many, see `gpu_decode.py`; `--lengths` may be empty.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {
    "d_model": 4096,
    "n_heads": 32,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50432,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
}
Forward = Callable[[torch.Tensor], torch.Tensor]
Weights = dict[str, torch.Tensor]


def random_weights(raw: dict[str, Any], seed: int = 0) -> Weights:
    """Draw float16 weights whose stream neither fades nor explodes; gains are not one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    d, hidden = raw["d_model"], raw["d_model"] * raw["expansion_ratio"]

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device="cuda")
        return (values * (scale * columns**-0.5)).half()

    def gain() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(d, generator=generator, device="cuda")).half()

    weights = {"transformer.wte.weight": matrix(raw["vocab_size"], d)}
    branch = (2 * raw["n_layers"]) ** -0.5
    for layer in range(raw["n_layers"]):
        at = f"transformer.blocks.{layer}."
        weights[at + "norm_1.weight"] = gain()
        weights[at + "attn.Wqkv.weight"] = matrix(3 * d, d)
        weights[at + "attn.out_proj.weight"] = matrix(d, d, branch)
        weights[at + "norm_2.weight"] = gain()
        weights[at + "ffn.up_proj.weight"] = matrix(hidden, d)
        weights[at + "ffn.down_proj.weight"] = matrix(d, hidden, branch)
    weights["transformer.norm_f.weight"] = gain()
    return weights


def slopes(heads: int, bias_max: float) -> torch.Tensor:
    """ALiBi slopes for a number of heads that is a power of two."""
    return torch.exp2(-torch.arange(1, heads + 1, device="cuda") * (bias_max / heads))


def block(x: torch.Tensor, w: tuple[torch.Tensor, ...], heads: int, attend: Any) -> torch.Tensor:
    """One block by PyTorch's functions; `attend` takes (1, heads, s, D) each."""
    norm_1, qkv, out, norm_2, up, down = w
    s, d = x.shape
    y = F.layer_norm(x, (d,), norm_1)
    q, k, v = (
        t.view(1, s, heads, d // heads).transpose(1, 2) for t in F.linear(y, qkv).chunk(3, -1)
    )
    x = x + F.linear(attend(q, k, v).transpose(1, 2).reshape(s, d), out)
    y = F.layer_norm(x, (d,), norm_2)
    return x + F.linear(F.gelu(F.linear(y, up)), down)


def in_torch(
    weights: Weights, raw: dict[str, Any], attend: Any, wide: bool = False, one: Any = block
) -> Forward:
    """Forward pass by PyTorch's functions; `wide` widens to float32, a matrix at a time."""
    names = ("norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj")

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if wide else tensor

    def forward(ids: torch.Tensor) -> torch.Tensor:
        x = cast(weights["transformer.wte.weight"][ids[0]])
        for layer in range(raw["n_layers"]):
            at = f"transformer.blocks.{layer}."
            ws = tuple(cast(weights[f"{at}{name}.weight"]) for name in names)
            x = one(x, ws, raw["n_heads"], attend)
        x = F.layer_norm(x, (raw["d_model"],), cast(weights["transformer.norm_f.weight"]))
        return F.linear(x, cast(weights["transformer.wte.weight"]))

    return forward


def bias_table(raw: dict[str, Any], length: int, dtype: torch.dtype) -> torch.Tensor:
    """ALiBi and the causal mask as one addend, (1, heads, length, length)."""
    at = torch.arange(length, device="cuda")
    distance = (at[None] - at[:, None]).float()
    bias = slopes(raw["n_heads"], 8)[:, None, None] * distance
    return bias.masked_fill(distance > 0, -math.inf).to(dtype)[None]


def golden(weights: Weights, raw: dict[str, Any], length: int) -> Forward:
    table = bias_table(raw, length, torch.float32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + table, -1) @ v

    return in_torch(weights, raw, attend, wide=True)


def sdpa(weights: Weights, raw: dict[str, Any], length: int) -> Forward:
    table = bias_table(raw, length, torch.float16)
    return in_torch(
        weights,
        raw,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=table),
    )


def flex(weights: Weights, raw: dict[str, Any], length: int) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    table = slopes(raw["n_heads"], 8)

    def alibi(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + table[h] * (j - i)

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    mask = create_block_mask(causal, None, None, length, length, device="cuda")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_attention(q, k, v, score_mod=alibi, block_mask=mask)

    return in_torch(weights, raw, attend, one=torch.compile(block, dynamic=False))


def transformers_eager(weights: Weights, raw: dict[str, Any], length: int) -> Forward:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(
        d_model=raw["d_model"],
        n_heads=raw["n_heads"],
        n_layers=raw["n_layers"],
        max_seq_len=max(length, raw["max_seq_len"]),
        vocab_size=raw["vocab_size"],
        no_bias=True,
    )
    with torch.device("meta"):
        model = MptForCausalLM(config).half().eval()
    state = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    model.load_state_dict(state, assign=True)
    return lambda ids: model(input_ids=ids, use_cache=False).logits[0]


def port(weights: Weights, raw: dict[str, Any], length: int) -> Forward:
    import tvm
    from tvm import relax

    from relax_impl.compile import compile_model
    from relax_impl.config import MPTConfig

    config = MPTConfig.from_dict(raw)
    library = compile_model(config, "float16", "cuda")
    machine = relax.VirtualMachine(library.executable, tvm.cuda(0))
    names = library.functions["forward"].parameters
    parameters = [tvm.runtime.from_dlpack(weights[name]) for name in names]
    function = machine["forward"]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        narrow = tvm.runtime.from_dlpack(ids.int())
        return torch.from_dlpack(function(narrow, *parameters))[0]

    return forward


PEERS = {
    "port": port,
    "transformers": transformers_eager,
    "torch-sdpa": sdpa,
    "torch-flex": flex,
}
PROTOCOLS = {"back-to-back": 0.0, "pauses of 100 ms": 0.1}


def timed(run: Callable[[], Any], rounds: int, pause: float = 0.0, warm: int = 3) -> float:
    """Median milliseconds between events of the device, with `pause` seconds before each run."""
    marks = []
    for _ in range(rounds + warm):
        time.sleep(pause)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        if pause:
            torch.cuda.synchronize()
        marks.append((start, end))
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in marks[warm:]), 3)


def milliseconds(forwards: dict[str, Forward], ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Median times, per protocol and implementation; they take turns, each with its own warm-up."""
    result: dict[str, Any] = {}
    for protocol, pause in PROTOCOLS.items():
        result[protocol] = {
            name: timed(functools.partial(forward, ids), rounds, pause)
            for name, forward in forwards.items()
        }
    return result


def profile(forward: Forward, ids: torch.Tensor) -> dict[str, Any]:
    """Time per kernel of one run, in microseconds, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        forward(ids)
        torch.cuda.synchronize()
    kernels = {
        event.key: {"calls": event.count, "microseconds": round(event.self_device_time_total, 1)}
        for event in recorded.key_averages()
        if event.self_device_time_total
    }
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["microseconds"]))


def environment() -> dict[str, str]:
    def output(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stdout.strip()

    query = ("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
    packages = ("torch", "transformers", "apache-tvm-ffi")
    import tvm

    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(0),
        "driver, power limit": output(*query),
        "python": platform.python_version(),
        "tvm": tvm.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
    } | {name: importlib.metadata.version(name) for name in packages}


def table(length: int, layers: int, found: dict[str, Any]) -> str:
    lines = ["", f"{length} tokens, {layers} layers, ms", ""]
    times = found["milliseconds"]
    lines.append("| implementation | " + " | ".join(times) + " | error of logits |")
    lines.append("|---|" + "---|" * (len(times) + 1))
    for name, error in found["relative error of logits"].items():
        row = " | ".join(str(times[protocol][name]) for protocol in times)
        lines.append(f"| {name} | {row} | {error:.2e} |")
    lines += [f"{name}: {why}" for name, why in found["failed"].items()]
    lines.append("")
    for name, kernel in list(found["kernels of the port"].items())[:12]:
        lines.append(f"{kernel['microseconds']:>10} us {kernel['calls']:>4} calls  {name[:90]}")
    return "\n".join(lines)


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> None:
    raw = SHAPE | {"n_layers": arguments.layers}
    weights = random_weights(raw)
    result: dict[str, Any] = {"environment": environment(), "shape": raw, "lengths": {}}
    print(", ".join(f"{key} {value}" for key, value in result["environment"].items()))
    if arguments.decode:
        import gpu_decode

        result["decode"] = gpu_decode.measure(
            weights, raw, arguments.decode, arguments.batch, arguments.rounds
        )
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for length in arguments.lengths:
        generator = torch.Generator("cuda").manual_seed(length)
        ids = torch.randint(raw["vocab_size"], (1, length), generator=generator, device="cuda")
        forwards, errors, agreements, seconds, wrong = {}, {}, {}, {}, {}
        exact = golden(weights, raw, length)(ids)
        for name in arguments.peers:
            start = time.perf_counter()
            try:
                forward = PEERS[name](weights, raw, length)
                logits = forward(ids).float()
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {error}"[-600:]
                continue
            forwards[name] = forward
            errors[name] = float(f"{((logits - exact).norm() / exact.norm()).item():.3e}")
            agreements[name] = round(
                (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(), 4
            )
            seconds[name] = round(time.perf_counter() - start, 1)
            del logits
        del exact
        torch.cuda.empty_cache()
        result["lengths"][str(length)] = {
            "milliseconds": milliseconds(forwards, ids, arguments.rounds),
            "relative error of logits": errors,
            "best token as in float32": agreements,
            "seconds to the first result": seconds,
            "failed": wrong,
            "kernels of the port": profile(forwards["port"], ids) if "port" in forwards else {},
            "GiB at most, torch": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }
        print(table(length, raw["n_layers"], result["lengths"][str(length)]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="Of decode steps.")
    parser.add_argument("--decode", type=int, nargs="*", help="Tokens in the cache.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.decode == []:
        arguments.decode = [128, 1023, 2047]
    measure(arguments)


if __name__ == "__main__":
    main()
