"""What a decode step costs as the past grows, beside PyTorch with a cache.

    python benchmarks/decode.py [--d-model 512] [--layers 8] [--heads 8] [--vocab 50432]
                                [--dtype float32] [--pasts 16,128,512,1024] [--steps 24]
                                [--threads 1] [--output FILE]

Random weights of one size for both. The port runs its compiled `extend` over its own cache; PyTorch
runs the transformers model, whose cache holds the same tensors. For every length of the past: a
median of single steps, in milliseconds, tokens per second, and what the port counted for a step:
positions through the blocks (one), positions through the head (one), scores (past + 1). The engines
run in processes of their own, one after the other, since each keeps threads waiting on the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "d_model": options.d_model,
        "n_heads": options.heads,
        "n_layers": options.layers,
        "vocab_size": options.vocab,
        "max_seq_len": 2 * max(options.pasts),
        "no_bias": True,
        "attn_config": {"alibi": True},
    }


def weights_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights: their values do not change what a step costs."""
    from cases.topology import tensor_shapes

    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def measured(step: Callable[[], object], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def port(options: argparse.Namespace) -> list[dict[str, Any]]:
    import ml_dtypes

    from relax_impl.compile import compile_model
    from relax_impl.config import MPTConfig
    from relax_impl.decoder import Decoder
    from relax_impl.loader import load_parameters, mapping
    from relax_impl.runtime import Model

    raw = config_of(options)
    config, held = MPTConfig.from_dict(raw), weights_of(raw)
    dtype = np.dtype(
        ml_dtypes.bfloat16 if options.dtype == "bfloat16" else getattr(np, options.dtype)
    )

    class Info:
        def __init__(self, name: str) -> None:
            self.name, self.shape, self.dtype = name, held[name].shape, options.dtype
            self.file = "memory"

    class Reader:
        tensors = tuple(map(Info, held))

        def read(self, name: str) -> np.ndarray:
            return held[name].astype(dtype)

    library = compile_model(config, options.dtype)
    parameters = load_parameters(config, Reader(), options.dtype, mapping(config, library.layout))
    decoder = Decoder(Model(library, parameters))
    rows = []
    for past in options.pasts:
        ids = np.random.default_rng(1).integers(0, options.vocab, (1, past)).astype(np.int32)
        _, cache = decoder.prefill(ids, last=True)
        # The first step may have to make room; it is not counted.
        decoder.decode(cache, ids[:, 0])
        cache.truncate([past])
        token = ids[:, 0]
        before = (decoder.work.tokens, decoder.work.logits, decoder.work.scores)

        def step(token: np.ndarray = token, cache: Any = cache, past: int = past) -> None:
            decoder.decode(cache, token)
            cache.truncate([past])

        seconds = measured(step, options.steps)
        after = (decoder.work.tokens, decoder.work.logits, decoder.work.scores)
        work = [(b - a) // options.steps for a, b in zip(before, after, strict=True)]
        rows.append({"past": past, "seconds": seconds, "work": work, "cache": cache.nbytes})
    return rows


def pytorch(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from transformers import DynamicCache, MptConfig, MptForCausalLM

    torch.set_num_threads(options.threads)
    raw = config_of(options)
    model = MptForCausalLM(
        MptConfig(
            d_model=options.d_model,
            n_heads=options.heads,
            n_layers=options.layers,
            vocab_size=options.vocab,
            max_seq_len=raw["max_seq_len"],
        )
    ).to(getattr(torch, options.dtype))
    model.eval()
    rows = []
    for past in options.pasts:
        ids = torch.randint(0, options.vocab, (1, past))
        with torch.inference_mode():
            cache = DynamicCache()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

            def step(cache: Any = cache, ids: Any = ids) -> None:
                model(ids[:, :1], past_key_values=cache, use_cache=True)
                cache.crop(-1)

            step()
            rows.append({"past": past, "seconds": measured(step, options.steps)})
    return rows


def table(options: argparse.Namespace, ours: list[Any], theirs: list[Any]) -> str:
    lines = [
        f"d_model {options.d_model}, {options.layers} layers, {options.heads} heads, "
        f"vocabulary {options.vocab}, {options.dtype}, {options.threads} thread(s), "
        f"{platform.machine()}, medians of {options.steps} steps in one run",
        "",
        "| past | port ms | tokens/s | PyTorch ms | tokens/s | tokens, logits, scores of a step "
        "| cache bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for mine, other in zip(ours, theirs, strict=True):
        a, b = statistics.median(mine["seconds"]), statistics.median(other["seconds"])
        work = ", ".join(map(str, mine["work"]))
        lines.append(
            f"| {mine['past']} | {a * 1e3:.2f} | {1 / a:.0f} | {b * 1e3:.2f} | {1 / b:.0f} "
            f"| {work} | {mine['cache']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("d-model", 512), ("layers", 8), ("heads", 8), ("vocab", 50432)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--pasts", default="16,128,512,1024")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine", choices=("port", "pytorch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    pasts = options.pasts
    options.pasts = [int(past) for past in pasts.split(",")]
    if options.engine:
        run = port if options.engine == "port" else pytorch
        print(json.dumps(run(options)))
        return
    threads = str(options.threads)
    variables = os.environ | {"TVM_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    found = []
    for engine in ("port", "pytorch"):
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{engine}: exit code {done.returncode}\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    text = table(options, *found)
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
