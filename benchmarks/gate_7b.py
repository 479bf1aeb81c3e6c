"""The gate at full size on one GPU: an MPT of the 7B shape, judged as `mpt-conform check` judges.

    python benchmarks/gate_7b.py --output FOLDER [--stages logits blocks paths] [--seconds 470]

The checkpoint is made by a seeded recipe on the device: matrices whose stream neither fades nor
explodes, gains off one and some of them negative or large, channels of the stream that every block
drives harder, values of bfloat16 converted to float16 as `bfloat16_to_float16.py` does. It is
written as a checkpoint directory and read back, so that all is judged that a user's would be.

The golden and every evaluation order run block by block on the same device, in float64. Statistics
of taps run on the host and are what takes the time, so the work is cut into stages, each a check of
its own over one compiled model, whose record is written as soon as it is there:

* ``logits``: prompts of 500 and 2048 tokens, the deployed forward, through all blocks;
* ``blocks``: prompts of 1, 7 and 64 tokens, every tap of every layer, ALiBi through the deployed
  kernel, free-running, logits, and proof that every tensor arrived;
* ``paths``: prefill, extend, decode, batches, padding, forks and roll-backs over the cache.

A stage that would begin after `--seconds` is not begun: not proven, exit code 3. Otherwise the exit
code is that of the worst verdict.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {
    "model_type": "mpt",
    "torch_dtype": "float16",
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50432,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
}
TINY = SHAPE | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 256}
FORWARD = frozenset({"forward"})
PARTS = FORWARD | {"embed", "block", "head", "attention_bias", "parameters"}
PATHS = FORWARD | {"prefill", "extend", "decode", "fork", "truncate", "attend"}
STAGES: dict[str, tuple[frozenset[str], tuple[int, ...]]] = {
    "logits": (FORWARD, (500, 2048)),
    "blocks": (PARTS, (1, 7, 64)),
    "paths": (PATHS, (7, 24)),
}


def tensor(name: str, shape: tuple[int, ...], seed: int, device: str) -> torch.Tensor:
    """Draw one tensor in float16; its values depend on seed, name and kind of device alone."""
    generator = torch.Generator(device).manual_seed(seed * 2**32 + zlib.crc32(name.encode()))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    values = normal(*shape)
    if name.endswith("wte.weight"):
        values *= 0.05
    elif len(shape) == 1:
        values = 1 + 0.3 * values
        at = torch.rand(shape[0], generator=generator, device=device)
        values[at < 0.1] *= -1
        values[at > 1 - 2.5 / shape[0]] *= 5
        if "norm_f" in name:
            values *= 2 / (0.05 * shape[0] ** 0.5)
    else:
        rows = torch.exp(0.3 * normal(shape[0]))
        gain = 1.3 if "Wqkv" in name else 0.3 if "out_proj" in name or "down_proj" in name else 1.0
        if gain == 0.3:
            outliers = np.random.default_rng(shape[0]).choice(shape[0], 2, replace=False)
            rows[torch.from_numpy(outliers).to(device)] *= 8
        values *= (rows * gain * shape[1] ** -0.5)[:, None]
    return values.bfloat16().half()


def write(folder: Path, raw: dict[str, Any], seed: int, device: str) -> None:
    """Write the checkpoint, a shard a layer."""
    from safetensors.torch import save_file

    from cases.topology import tensor_shapes

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(raw).items():
        part = name.split(".")[2] if ".blocks." in name else "ends"
        shards.setdefault(part, {})[name] = tuple(shape)
    places = {}
    for part, tensors in shards.items():
        file = f"model-{part}.safetensors"
        made = {n: tensor(n, shape, seed, device).cpu() for n, shape in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only(subject: Any, methods: frozenset[str]) -> Any:
    """Return the subject with some of its methods."""
    kept = {name: getattr(subject, name) for name in methods}
    for field in ("protocol", "name", "dtype", "rounding"):
        kept[field] = getattr(subject, field)
    return type("Only", (), {name: _constant(value) for name, value in kept.items()})()


def _constant(value: Any) -> Any:
    return property(lambda self: value)


def prompts(folder: Path, lengths: tuple[int, ...], raw: dict[str, Any], seed: int) -> Path:
    """Write prompts of random tokens."""
    folder.mkdir()
    for length in lengths:
        generator = np.random.default_rng([seed, length])
        cut = min(length, raw["max_seq_len"])
        ids = generator.integers(0, raw["vocab_size"], cut).astype(np.int32)
        np.save(folder / f"tokens-{cut:04}.npy", ids)
    return folder


def gate(options: argparse.Namespace, work: Path) -> int:
    """Run the stages; returns the exit code."""
    from harness.errors import EXIT_CONFORMS, EXIT_DIVERGES, EXIT_NOT_PROVEN
    from harness.faults.library import parse
    from harness.pipeline import Request, check
    from harness.report.files import to_json, write_whole
    from harness.subjects.relax import load

    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {text}", flush=True)

    def progress(text: str) -> None:
        if options.verbose:
            say("  " + text)

    device = "cpu" if options.target == "llvm" else "cuda"
    raw = (TINY if options.tiny else SHAPE) | (
        {"n_layers": options.n_layers} if options.n_layers else {}
    )
    checkpoint = work / "checkpoint"
    say("making the checkpoint")
    write(checkpoint, raw, options.seed, device)
    say("compiling and loading the port")
    planted = {"fault": parse(options.fault, raw["n_layers"])} if options.fault else {}
    subject = load(
        checkpoint, dtype="float16", target=options.target, bundle=options.bundle, **planted
    )
    summary: dict[str, Any] = {"shape": raw, "seed": options.seed, "stages": {}}
    codes = [EXIT_CONFORMS]
    for name in options.stages:
        if time.perf_counter() - began > options.seconds:
            say(f"{name}: not begun, {options.seconds} s are over")
            codes.append(EXIT_NOT_PROVEN)
            summary["stages"][name] = {"verdict": "not-proven", "reason": "no time left"}
            continue
        methods, lengths = STAGES[name]
        started = time.perf_counter()
        say(f"{name}: prompts of {', '.join(map(str, lengths))} tokens")
        request = Request(
            checkpoint=checkpoint,
            target=options.target,
            prompts=str(prompts(work / name, lengths, raw, options.seed)),
            device=device,
            diagnose=False,
        )
        report = check(request, progress, given=only(subject, methods))
        write_whole(options.output / f"gate-{name}.json", to_json(report))
        first = report.first_divergence
        one = {"verdict": report.verdict, "reason": report.reason}
        one["seconds"] = round(time.perf_counter() - started, 1)
        one["first divergence"] = json.loads(to_json(first)) if first is not None else None
        if device == "cuda":
            # The port's own memory is TVM's, which the driver counts.
            free, total = torch.cuda.mem_get_info()
            one["GiB at most, golden"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            one["GiB in use, all"] = round((total - free) / 2**30, 1)
        one["GiB at most, host"] = round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1
        )
        summary["stages"][name] = one
        say(f"{name}: {json.dumps(one)}")
        worst = {"conforms": EXIT_CONFORMS, "diverges": EXIT_DIVERGES}
        codes.append(worst.get(report.verdict, EXIT_NOT_PROVEN))
        summary["seconds"] = round(time.perf_counter() - began, 1)
        write_whole(options.output / "gate.json", json.dumps(summary, indent=1).encode() + b"\n")
    write_whole(options.output / "gate.json", json.dumps(summary, indent=1).encode() + b"\n")
    return EXIT_DIVERGES if EXIT_DIVERGES in codes else max(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--target", default="cuda", choices=["cuda", "llvm"])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--fault", help="Plant a fault, as `check --fault` does.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--n-layers", type=int, help="Fewer blocks than 32.")
    parser.add_argument("--tiny", action="store_true", help="A shape for a try on a processor.")
    parser.add_argument("--work", type=Path, help="Where the checkpoint of 13 GB goes.")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        with torch.inference_mode():
            code = gate(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
