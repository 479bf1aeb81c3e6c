"""The gate at full size on one GPU: an MPT of the 7B shape, judged as `mpt-conform check` judges.

    python benchmarks/gate_7b.py --output FOLDER [--stages logits blocks paths edge]
                                 [--together 2] [--seconds 470]

The checkpoint is made by a seeded recipe on the device: matrices whose stream neither fades nor
explodes, gains off one and some of them negative or large, channels of the stream that every block
drives harder, values of bfloat16 converted to float16 as `bfloat16_to_float16.py` does. It is
written as a checkpoint directory and read back, so that all is judged that a user's would be.

The golden and every evaluation order run block by block on the same device, in float64. Statistics
of taps run on the host and are what takes the time, so the work is cut into stages, each a check of
its own over one compiled model, whose record is written as soon as it is there:

* ``logits``: prompts of 500 and 2048 tokens and a batch of two, the deployed forward, through all
  blocks;
* ``blocks``: prompts of 1, 7 and 64 tokens, every tap of every layer, ALiBi through the deployed
  kernel, free-running, logits, and proof that every tensor arrived;
* ``paths``: prefill, extend, decode, batches, padding, forks and roll-backs over the cache;
* ``edge``: a prompt of 2047 tokens, which fills no tile, as ``logits``.

With `--together N` so many stages run side by side, each in a process of its own over the same
checkpoint: most of their time is the host's. A stage that would begin after `--seconds` is not
begun: not proven, exit code 3. Otherwise the exit code is that of the worst verdict.

`--shape` takes the shape of another released model; with `--n-layers` a few blocks of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
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
SHAPES = {
    "7b": SHAPE,
    "storywriter": SHAPE
    | {
        "max_seq_len": 65536,
        "attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6},
    },
    "30b": SHAPE | {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192},
}
TINY = SHAPE | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 256}
FORWARD = frozenset({"forward"})
PARTS = FORWARD | {"embed", "block", "head", "attention_bias", "parameters"}
PATHS = FORWARD | {"prefill", "extend", "decode", "fork", "truncate", "attend"}
STAGES: dict[str, tuple[frozenset[str], tuple[int, ...]]] = {
    "logits": (FORWARD, (500, 2048)),
    "blocks": (PARTS, (1, 7, 64)),
    "paths": (PATHS, (7, 24)),
    "edge": (FORWARD, (2047,)),
    "long": (FORWARD, (8192,)),
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


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config that was asked for."""
    raw = TINY if options.tiny else SHAPES[options.shape]
    return raw | ({"n_layers": options.n_layers} if options.n_layers else {})


def exit_code(stages: dict[str, dict[str, Any]]) -> int:
    """Return the code of the worst verdict; what diverges weighs more than what is not proven."""
    from harness.errors import EXIT_CONFORMS, EXIT_DIVERGES, EXIT_NOT_PROVEN

    known = {"conforms": EXIT_CONFORMS, "diverges": EXIT_DIVERGES}
    codes = [known.get(stage["verdict"], EXIT_NOT_PROVEN) for stage in stages.values()]
    return EXIT_DIVERGES if EXIT_DIVERGES in codes else max(codes)


def not_begun() -> dict[str, Any]:
    return {"verdict": "not-proven", "reason": "no time left"}


class Clock:
    """Seconds since it was made, and lines that begin with them."""

    def __init__(self, name: str = "") -> None:
        self._began, self._name = time.perf_counter(), name

    def seconds(self) -> float:
        return round(time.perf_counter() - self._began, 1)

    def say(self, text: str) -> None:
        print(f"{self._name}{self.seconds():7.1f} s  {text}", flush=True)


def one_stage(
    name: str, subject: Any, checkpoint: Path, options: argparse.Namespace, work: Path, clock: Clock
) -> dict[str, Any]:
    """Run one stage, write its record, and return what the summary says of it."""
    from harness.pipeline import Request, check
    from harness.report.files import to_json, write_whole

    methods, lengths = STAGES[name]
    started = time.perf_counter()
    clock.say(f"{name}: prompts of {', '.join(map(str, lengths))} tokens")
    device = "cpu" if options.target == "llvm" else "cuda"
    request = Request(
        checkpoint=checkpoint,
        target=options.target,
        prompts=str(prompts(work / name, lengths, shape(options), options.seed)),
        device=device,
        diagnose=False,
    )

    def progress(text: str) -> None:
        if options.verbose:
            clock.say("  " + text)

    report = check(request, progress, given=only(subject, methods))
    write_whole(options.output / f"gate-{name}.json", to_json(report))
    first = report.first_divergence
    one: dict[str, Any] = {"verdict": report.verdict, "reason": report.reason}
    one["seconds"] = round(time.perf_counter() - started, 1)
    one["compared"] = {axis: f"{n.compared}/{n.expected}" for axis, n in report.compared.items()}
    one["first divergence"] = json.loads(to_json(first)) if first is not None else None
    if device == "cuda":
        # The port's own memory is TVM's, which the driver counts.
        free, total = torch.cuda.mem_get_info()
        one["GiB at most, golden"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        one["GiB in use, all processes"] = round((total - free) / 2**30, 1)
    one["GiB at most, host"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    clock.say(f"{name}: {json.dumps(one)}")
    return one


def run_here(options: argparse.Namespace, checkpoint: Path, work: Path, clock: Clock) -> int:
    """Run the stages one after another over one compiled model; returns the exit code."""
    from harness.faults.library import parse
    from harness.subjects.relax import load

    raw = shape(options)
    clock.say("compiling and loading the port")
    planted = {"fault": parse(options.fault, raw["n_layers"])} if options.fault else {}
    subject = load(
        checkpoint, dtype="float16", target=options.target, bundle=options.bundle, **planted
    )
    stages: dict[str, dict[str, Any]] = {}
    for name in options.stages:
        if clock.seconds() > options.seconds:
            clock.say(f"{name}: not begun, {options.seconds} s are over")
            stages[name] = not_begun()
        else:
            stages[name] = one_stage(name, subject, checkpoint, options, work, clock)
        summarise(options, stages, clock)
    return exit_code(stages)


def run_together(options: argparse.Namespace, checkpoint: Path, clock: Clock) -> int:
    """Run the stages in processes of their own, some at a time; returns the exit code."""
    stages: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        left = options.seconds - clock.seconds()
        if left < 0:
            return not_begun()
        folder = options.output / name
        words = [sys.executable, __file__, "--stages", name, "--checkpoint", str(checkpoint)]
        words += ["--output", str(folder), "--target", options.target, "--seed", str(options.seed)]
        words += ["--seconds", str(left), "--shape", options.shape]
        for option in ("bundle", "fault", "n_layers", "work"):
            if getattr(options, option) is not None:
                words += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        words += [f"--{flag}" for flag in ("tiny", "verbose") if getattr(options, flag)]
        code = subprocess.run(words, check=False).returncode
        summary = folder / "gate.json"
        if not summary.exists():
            return {"verdict": "not-proven", "reason": f"the stage ended with exit code {code}"}
        found: dict[str, Any] = json.loads(summary.read_bytes())["stages"][name]
        return found

    with ThreadPoolExecutor(options.together) as pool:
        waiting = {pool.submit(run, name): name for name in options.stages}
        for done in as_completed(waiting):
            stages[waiting[done]] = done.result()
            summarise(options, stages, clock)
    return exit_code(stages)


def summarise(options: argparse.Namespace, stages: dict[str, dict[str, Any]], clock: Clock) -> None:
    """Write what is known so far."""
    from harness.report.files import write_whole

    summary: dict[str, Any] = {"shape": shape(options), "seed": options.seed}
    summary |= {"side by side": options.together} if options.together > 1 else {}
    summary |= {"stages": stages, "seconds": clock.seconds()}
    write_whole(options.output / "gate.json", json.dumps(summary, indent=1).encode() + b"\n")


def gate(options: argparse.Namespace, work: Path) -> int:
    """Run the stages; returns the exit code."""
    clock = Clock(f"{options.stages[0]:>7}" if options.checkpoint else "")
    checkpoint = options.checkpoint or work / "checkpoint"
    if options.checkpoint is None:
        clock.say("making the checkpoint")
        device = "cpu" if options.target == "llvm" else "cuda"
        write(checkpoint, shape(options), options.seed, device)
        if device == "cuda":
            torch.cuda.empty_cache()
    if options.together > 1:
        return run_together(options, checkpoint, clock)
    return run_here(options, checkpoint, work, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    stages = [name for name in STAGES if name != "long"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=list(STAGES))
    parser.add_argument("--together", type=int, default=1, help="Stages side by side.")
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--target", default="cuda", choices=["cuda", "llvm"])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--fault", help="Plant a fault, as `check --fault` does.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--shape", default="7b", choices=list(SHAPES))
    parser.add_argument("--checkpoint", type=Path, help="One that is there, of that shape.")
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
