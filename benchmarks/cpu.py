"""The port on this machine's CPU beside other engines, and beside what the machine can do.

    python benchmarks/cpu.py forward [--threads 1,2] [--batches 1] [--lengths 1,7,64,128,500,2048]
                             [--engines port-float32,port-float16,onnxruntime,...] [--rounds 3]
    python benchmarks/cpu.py block   [--threads 1,2]    one block of 4096 / 32 heads / 16384, T 128
    python benchmarks/cpu.py decode  [--threads 1,2]    one token after 128, in GB/s of weights read
    python benchmarks/cpu.py render                     benchmarks/results/cpu.md from cpu.json

The model: d_model 512, 8 layers, 8 heads, vocabulary 50432, logits of every position. Every engine
gets the same random weights, runs in a process of its own (threads that one leaves spinning would
slow the next one down) and the engines alternate, round by round. `ceiling` takes a turn in every
round: the multiply-adds per second of a loop that does nothing else, and bytes read per second from
an array larger than the caches, by the same number of threads. A ratio is of two medians of the
same round; its spread is over the rounds. Rounds in which other processes took more than `QUIET`
of a core have tables of their own: with two threads on two cores they say little.

What is measured is merged into benchmarks/results/cpu.json, so that a long campaign may be run in
pieces. Beyond the project's own dependencies it takes what the engines named need: onnxruntime,
onnx, onnxscript, openvino, ctranslate2. The models they want are made once, in --work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
MODEL = {"d_model": 512, "n_heads": 8, "n_layers": 8, "vocab_size": 50432}
BLOCK = {"d_model": 4096, "n_heads": 32, "n_layers": 1, "vocab_size": 16}
PEERS = ("transformers", "torch.compile", "onnxruntime", "openvino", "ctranslate2")
ENGINES = ("port-float32", "port-float16", *PEERS)
PAST = 128
QUIET = 0.1


def raw_config(sizes: dict[str, int]) -> dict[str, Any]:
    return {**sizes, "max_seq_len": 4096, "no_bias": True, "attn_config": {"alibi": True}}


def weights(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Random float32 weights by their original names; gains differ from one."""
    from cases.topology import tensor_shapes

    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if len(shape) == 2
        else 1 + np.float32(0.1) * random.standard_normal(shape, dtype=np.float32)
        for name, shape in tensor_shapes(raw_config(sizes)).items()
    }


def ids_of(batch: int, length: int) -> np.ndarray:
    random = np.random.default_rng(batch * 10000 + length)
    return random.integers(0, MODEL["vocab_size"], (batch, length))


def timed(step: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of single calls, at least 2, for about `seconds` in all, after one that warms up."""
    step()
    found: list[float] = []
    while len(found) < 2 or (sum(found) < seconds and len(found) < 200):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


class Port:
    """The port without its checks of the arguments: compiled functions and tensors."""

    def __init__(self, sizes: dict[str, int], dtype: str) -> None:
        import tvm
        from tvm import relax

        from relax_impl.compile import compile_model
        from relax_impl.config import MPTConfig

        start = time.perf_counter()
        self.library = compile_model(MPTConfig.from_dict(raw_config(sizes)), dtype)
        self.compiled = time.perf_counter() - start
        self.machine = relax.VirtualMachine(self.library.executable, tvm.cpu())
        self.dtype = dtype
        store = self.library.layout.store
        self.held = {
            name: self.tensor((store(value) if value.ndim == 2 else value).astype(dtype))
            for name, value in weights(sizes).items()
        }

    def tensor(self, array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(np.ascontiguousarray(array))

    def call(self, function: str, prefix: str, *inputs: Any) -> Any:
        names = self.library.functions[function].parameters
        return self.machine[function](*inputs, *(self.held[prefix + name] for name in names))


def torch_model() -> Any:
    import torch
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(
        d_model=MODEL["d_model"],
        n_heads=MODEL["n_heads"],
        n_layers=MODEL["n_layers"],
        vocab_size=MODEL["vocab_size"],
        max_seq_len=4096,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = MptForCausalLM(config)
    state = {name: torch.from_numpy(value) for name, value in weights(MODEL).items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def onnx_file(work: Path) -> Path:
    """The model as ONNX with dynamic batch and length, exported once."""
    path, unfinished = work / "onnx" / "mpt.onnx", work / f"onnx-{os.getpid()}"
    if not path.exists():
        unfinished.mkdir()
        import torch

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = torch_model()

            def forward(self, ids: Any) -> Any:
                return self.model(ids, use_cache=False).logits

        axes = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("s", min=1, max=4096)}
        torch.onnx.export(
            Logits(),
            (torch.from_numpy(ids_of(2, 20)),),
            unfinished / path.name,
            dynamo=True,
            dynamic_shapes=(axes,),
            input_names=["ids"],
            output_names=["logits"],
            external_data=True,
        )
        unfinished.rename(path.parent)
    return path


def ctranslate_directory(work: Path) -> Path:
    """The model in ctranslate2's format, converted once."""
    path = work / "ctranslate2"
    if not path.exists():
        from ctranslate2.converters.transformers import MPTLoader
        from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

        model = torch_model()
        spec = TransformerDecoderModelSpec.from_config(
            MODEL["n_layers"],
            MODEL["n_heads"],
            pre_norm=True,
            activation=common_spec.Activation.GELU,
            alibi=True,
        )
        MPTLoader().set_decoder(spec.decoder, model.transformer)
        spec.decoder.projection.weight = spec.decoder.embeddings.weight
        spec.register_vocabulary([str(i) for i in range(MODEL["vocab_size"])])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        spec.optimize()
        unfinished = work / f"ctranslate2-{os.getpid()}"
        unfinished.mkdir()
        spec.save(str(unfinished))
        unfinished.rename(path)
    return path


def runner(engine: str, threads: int, work: Path) -> Callable[[np.ndarray], Any]:
    """Return what runs an engine on ids (b, s): logits, in whatever form the engine has them."""
    if engine.startswith("port"):
        port = Port(MODEL, engine.split("-")[1])
        held: dict[tuple[int, ...], Any] = {}

        def run(ids: np.ndarray) -> Any:
            if ids.shape not in held:
                held[ids.shape] = port.tensor(ids.astype(np.int32))
            return port.call("forward", "", held[ids.shape])

        return run
    if engine in ("transformers", "torch.compile"):
        import torch

        torch.set_num_threads(threads)
        model: Any = torch_model()
        if engine == "torch.compile":
            model = torch.compile(model, dynamic=True)

        def forward(ids: np.ndarray) -> Any:
            with torch.inference_mode():
                return model(torch.from_numpy(ids), use_cache=False).logits

        return forward
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            onnx_file(work), options, providers=["CPUExecutionProvider"]
        )
        return lambda ids: session.run(None, {"ids": ids})[0]
    if engine == "openvino":
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(onnx_file(work), "CPU", settings).create_infer_request()
        return lambda ids: request.infer({"ids": ids}, share_outputs=True)[0]
    if engine == "ctranslate2":
        import ctranslate2

        generator = ctranslate2.Generator(
            str(ctranslate_directory(work)), intra_threads=threads, compute_type="float32"
        )
        return lambda ids: generator.forward_batch(ids.tolist(), return_log_probs=False)
    raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, found {engine}")


def as_array(logits: Any) -> np.ndarray:
    if hasattr(logits, "numpy"):
        return np.asarray(logits.numpy())
    return np.asarray(logits)


def forward(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every call, by ``batch x length``, and some logits to compare engines by."""
    run = runner(options.engine, options.threads[0], options.work)
    found: dict[str, Any] = {}
    for batch in options.batches:
        for length in options.lengths:
            ids = ids_of(batch, length)
            found[f"{batch}x{length}"] = timed(lambda ids=ids: run(ids), options.seconds)  # type: ignore[misc]
    sample = as_array(run(ids_of(2, 9)))[:, -1, :64]
    return {"seconds": found, "logits": sample.astype(float).tolist()}


def block(options: argparse.Namespace) -> dict[str, Any]:
    port = Port(BLOCK, options.engine.split("-")[1])
    random = np.random.default_rng(1)
    hidden = random.standard_normal((1, 128, BLOCK["d_model"]), dtype=np.float32)
    stream = port.tensor(hidden.astype(port.dtype))
    prefix = "transformer.blocks.0."
    seconds = timed(lambda: port.call("block", prefix, stream), options.seconds)
    # Products of weights: 2 * 12 d^2 for each token; attention, below the diagonal only.
    flops = 128 * (24 * BLOCK["d_model"] ** 2) + 4 * BLOCK["d_model"] * 128 * 129 // 2
    return {"seconds": seconds, "flops": flops}


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """One token after `PAST` others, head included; the bytes are those of all weights."""
    port = Port(MODEL, options.engine.split("-")[1])
    config = port.library.config
    from relax_impl.cached import key_shape, value_shape

    panels = (PAST + 16) // 16
    caches = [
        port.tensor(np.zeros(shape(config, 1, panels), port.dtype))
        for _ in range(config.n_layers)
        for shape in (key_shape, value_shape)
    ]
    ids = port.tensor(np.array([[7]], np.int32))
    lengths = port.tensor(np.array([PAST], np.int32))
    starts = port.tensor(np.array([0], np.int32))

    def step() -> Any:
        return port.call("head", "", port.call("extend", "", ids, lengths, starts, *caches))

    seconds = timed(step, options.seconds)
    hidden = port.call("extend", "", ids, lengths, starts, *caches)
    head = timed(lambda: port.call("head", "", hidden), options.seconds)
    width = np.dtype(port.dtype).itemsize
    table = MODEL["vocab_size"] * MODEL["d_model"] * width
    total = sum(int(np.prod(tensor.shape)) * width for tensor in port.held.values())
    return {"seconds": seconds, "bytes": total, "head_seconds": head, "head_bytes": table}


def ceiling(options: argparse.Namespace) -> dict[str, float]:
    """Multiply-adds per second, and bytes read per second, of all threads together."""
    import tvm
    from tvm.script import tirx as T

    from relax_impl.target import resolve

    rounds, sums = 2_000_000, 12

    @T.prim_func(s_tir=True)
    def multiply(y: T.handle) -> None:
        T.func_attr({"global_symbol": "multiply", "tirx.noalias": True})
        n = T.int64()
        Y = T.match_buffer(y, (n, 8 * sums), "float32")
        for i in T.parallel(n):
            acc = T.alloc_buffer((8 * sums,), "float32", scope="local")
            for r in T.unroll(sums):
                acc[T.ramp(r * 8, 1, 8)] = T.broadcast(T.float32(0), 8)
            for _ in range(rounds):
                for r in T.unroll(sums):
                    acc[T.ramp(r * 8, 1, 8)] = T.fma(
                        acc[T.ramp(r * 8, 1, 8)],
                        T.broadcast(T.float32(0.5), 8),
                        T.broadcast(T.float32(1), 8),
                    )
            for r in T.unroll(sums):
                Y[i, T.ramp(r * 8, 1, 8)] = acc[T.ramp(r * 8, 1, 8)]

    @T.prim_func(s_tir=True)
    def read(x: T.handle, y: T.handle) -> None:
        T.func_attr({"global_symbol": "read", "tirx.noalias": True})
        n, m = T.int64(), T.int64()
        X = T.match_buffer(x, (n, m, 64), "float32")
        Y = T.match_buffer(y, (n, 64), "float32")
        for i in T.parallel(n):
            acc = T.alloc_buffer((64,), "float32", scope="local")
            for r in T.unroll(8):
                acc[T.ramp(r * 8, 1, 8)] = T.broadcast(T.float32(0), 8)
            for k in range(m):
                for r in T.unroll(8):
                    acc[T.ramp(r * 8, 1, 8)] = (
                        acc[T.ramp(r * 8, 1, 8)] + X[i, k, T.ramp(r * 8, 1, 8)]
                    )
            for r in T.unroll(8):
                Y[i, T.ramp(r * 8, 1, 8)] = acc[T.ramp(r * 8, 1, 8)]

    module = tvm.IRModule({"multiply": multiply, "read": read})
    built = tvm.compile(module, target=resolve("llvm"), tir_pipeline="s_tir")
    n, size = options.threads[0], 1 << 28
    out = tvm.runtime.tensor(np.zeros((n, 8 * sums), np.float32))
    flops = 2 * 8 * sums * rounds * n / min(timed(lambda: built["multiply"](out), 0.5))
    array = tvm.runtime.tensor(np.ones((n, size // 256 // n, 64), np.float32))
    total = tvm.runtime.tensor(np.zeros((n, 64), np.float32))
    return {"flops": flops, "read": size / min(timed(lambda: built["read"](array, total), 0.5))}


WORKERS = {"forward": forward, "block": block, "decode": decode, "ceiling": ceiling}


def spawn(options: argparse.Namespace, task: str, engine: str, threads: int) -> Any:
    command = [
        *(sys.executable, __file__, task, "--worker", "--engines", engine),
        *("--threads", str(threads), "--seconds", str(options.seconds)),
        *("--batches", ",".join(map(str, options.batches))),
        *("--lengths", ",".join(map(str, options.lengths)), "--work", str(options.work)),
    ]
    count = str(threads)
    variables = os.environ | {"TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{engine}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def busy() -> tuple[float, float]:
    """Seconds of processor time that all processes have used, and that our ended children have."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    total = sum(map(int, fields[:8]))
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (total - idle) / os.sysconf("SC_CLK_TCK"), ours.ru_utime + ours.ru_stime


def campaign(options: argparse.Namespace, path: Path) -> None:
    """Measure round by round and merge into the results after each round."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    for threads in options.threads:
        for _ in range(options.rounds):
            start, (everyone, ours) = time.perf_counter(), busy()
            turn: dict[str, Any] = {"ceiling": spawn(options, "ceiling", "ceiling", threads)}
            for engine in options.engines:
                turn[engine] = spawn(options, options.task, engine, threads)
            spent, (everyone_now, ours_now) = time.perf_counter() - start, busy()
            others = (everyone_now - everyone - (ours_now - ours)) / spent
            results = json.loads(path.read_text()) if path.exists() else {"rounds": []}
            results["rounds"].append(
                {
                    "task": options.task,
                    "threads": threads,
                    "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "others": round(others, 2),
                    "engines": turn,
                }
            )
            names = ("apache-tvm", "torch", *(p for p in PEERS if p != "torch.compile"))
            results["versions"] = {name: installed(name) for name in names}
            results["machine"] = f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}"
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(summary(turn)), flush=True)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def summary(turn: dict[str, Any]) -> dict[str, Any]:
    """Medians in ms of one round, for the terminal."""
    found: dict[str, Any] = {}
    for engine, result in turn.items():
        seconds = result.get("seconds")
        if seconds is None:
            found[engine] = {name: round(value / 1e9, 1) for name, value in result.items()}
        elif isinstance(seconds, dict):
            found[engine] = {
                shape: round(statistics.median(s) * 1e3, 2) for shape, s in seconds.items()
            }
        else:
            found[engine] = round(statistics.median(seconds) * 1e3, 2)
    return found


def spread(values: list[float], form: str) -> str:
    """Median, and in brackets smallest and largest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def flops_of(batch: int, length: int) -> float:
    """Multiply-adds, times two, of a forward: weights, and attention below the diagonal."""
    d, layers, vocab = MODEL["d_model"], MODEL["n_layers"], MODEL["vocab_size"]
    per_token = 24 * d * d * layers + 2 * d * vocab
    return batch * (length * per_token + layers * 4 * d * length * (length + 1) / 2)


def render(results: dict[str, Any]) -> str:
    """The tables, from the recorded rounds."""
    parts = [
        "# The port on a CPU beside other engines",
        "",
        f"{results['machine']}. "
        + ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v != "none")
        + ".",
        "Made by `python benchmarks/cpu.py`; how: see its head. Milliseconds are medians of one",
        "round, given as median over the rounds (smallest-largest); ratios are the port's time",
        "over the other engine's in the same round, so below 1 the port is ahead.",
    ]
    for threads in sorted({r["threads"] for r in results["rounds"]}):
        every = [r for r in results["rounds"] if r["threads"] == threads]
        groups = {
            "undisturbed": [r for r in every if r["others"] <= QUIET],
            "disturbed": [r for r in every if r["others"] > QUIET],
        }
        for name, rounds in groups.items():
            parts += ["", f"## {threads} thread(s), {len(rounds)} {name} rounds"]
            if not rounds:
                continue
            peak = [r["engines"]["ceiling"]["flops"] / 1e9 for r in rounds]
            read = [r["engines"]["ceiling"]["read"] / 1e9 for r in rounds]
            others = [r["others"] for r in rounds]
            parts += [
                "",
                f"Multiply-add peak {spread(peak, '.1f')} GFLOP/s, "
                f"reading {spread(read, '.1f')} GB/s; "
                f"other processes used {spread(others, '.2f')} of a core.",
            ]
            parts += forward_tables([r for r in rounds if r["task"] == "forward"])
            parts += other_tables(rounds)
    return "\n".join(parts) + "\n"


def forward_tables(rounds: list[dict[str, Any]]) -> list[str]:
    cells: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for one in rounds:
        medians = {
            engine: {shape: statistics.median(s) for shape, s in result["seconds"].items()}
            for engine, result in one["engines"].items()
            if engine != "ceiling"
        }
        peak = one["engines"]["ceiling"]["flops"]
        for engine, shapes in medians.items():
            for shape, seconds in shapes.items():
                share = flops_of(*map(int, shape.split("x"))) / seconds / peak
                cells.setdefault(shape, {}).setdefault(engine, []).append((seconds * 1e3, share))
                for ours in ("port-float32", "port-float16"):
                    if engine != ours and shape in medians.get(ours, {}):
                        key = shape, engine, ours
                        ratios.setdefault(key, []).append(medians[ours][shape] / seconds)
    lines: list[str] = []
    order = sorted(cells, key=lambda shape: tuple(map(int, shape.split("x"))))
    if order:
        lines += [
            "",
            "| batch x length | engine | ms | of the peak | port float32 / it "
            "| port float16 / it |",
            "|---|---|---|---|---|---|",
        ]
    for shape in order:
        for engine, pairs in cells[shape].items():
            found = [ratios.get((shape, engine, f"port-{d}"), []) for d in ("float32", "float16")]
            first, second = (spread(r, ".2f") if r else "" for r in found)
            lines.append(
                f"| {shape} | {engine} | {spread([p[0] for p in pairs], '.2f')} "
                f"| {statistics.median(p[1] for p in pairs):.0%} | {first} | {second} |"
            )
    return lines


def other_tables(rounds: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    tables = (
        ("block", "flops", "flops", "GFLOP/s", "one block 4096/32/16384, T 128"),
        ("decode", "bytes", "read", "GB/s", f"a decode step after {PAST} tokens, all weights read"),
        ("decode", "head_bytes", "read", "GB/s", "its head alone"),
    )
    for task, what, limit, unit, title in tables:
        found: dict[str, list[tuple[float, float, float]]] = {}
        for one in (r for r in rounds if r["task"] == task):
            top = one["engines"]["ceiling"][limit]
            for engine, result in one["engines"].items():
                if engine != "ceiling":
                    key = "head_seconds" if what == "head_bytes" else "seconds"
                    seconds = statistics.median(result[key])
                    rate = result[what] / seconds
                    row = (seconds * 1e3, rate / 1e9, rate / top)
                    found.setdefault(engine, []).append(row)
        if found:
            lines += ["", f"| {title} | ms | {unit} | of the ceiling |", "|---|---|---|---|"]
        for engine, rows in found.items():
            ms, rate, share = ([row[i] for row in rows] for i in range(3))
            cells = spread(ms, ".2f"), spread(rate, ".1f"), spread(share, ".0%")
            lines.append(f"| {engine} | {' | '.join(cells)} |")
    return lines


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=(*WORKERS, "render"))
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--lengths", type=numbers, default=[1, 7, 64, 128, 500, 2048])
    parser.add_argument("--engines", help=f"some of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of every measurement")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mpt-cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.engine = options.engines
        print(json.dumps(WORKERS[options.task](options)))
        return
    if options.task == "render":
        text = render(json.loads(options.output.read_text()))
        notes = options.output.with_name("cpu-notes.md")
        if notes.exists():
            text += "\n" + notes.read_text()
        options.output.with_suffix(".md").write_text(text)
        print(text, end="")
        return
    default = ENGINES if options.task == "forward" else ENGINES[:2]
    options.engines = options.engines.split(",") if options.engines else list(default)
    options.work.mkdir(parents=True, exist_ok=True)
    campaign(options, options.output)


if __name__ == "__main__":
    main()
