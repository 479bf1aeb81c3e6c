"""How long one forward takes, of every peer in one run: each in a process of its own, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cases.exposure import Exposure, materialise, small_config
from harness.errors import BadInput
from harness.peers.ask import versions
from harness.peers.cell import OWN, Speed
from harness.subjects.load import load_subject
from harness.subjects.peers.registry import PEERS
from harness.subjects.protocol import Array

MODEL = Exposure(
    "speed",
    small_config(8, 64, n_layers=8, vocab_size=50432, max_seq_len=2048),
    seed=2900,
    shows="d_model 512, 8 layers, 8 heads, vocabulary 50432",
)
LENGTH = 128


def _dtype(name: str) -> str:
    """Return float32, or the first dtype of a peer that has none."""
    dtypes = ("float32",) if name == OWN else PEERS[name].dtypes
    return "float32" if "float32" in dtypes else dtypes[0]


def measure(
    names: Sequence[str],
    folder: Path,
    threads: int,
    rounds: int,
    progress: Callable[[str], None],
    *,
    pythons: Mapping[str, str] | None = None,
    ready: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Time every peer, one after another, round after round.

    Parameters
    ----------
    names
        `OWN` or peers; one that refuses the model is left out, with a sentence.
    folder
        Where the checkpoint is kept.
    threads
        CPUs that each process may use.
    rounds
        Forwards of each that are timed, after one that is not.
    pythons
        Peer to another interpreter, for those that cannot live in this one's environment.
    ready
        Called when all are loaded and nothing has been timed yet.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    seen: dict[str, list[float]] = {}
    who: dict[str, dict[str, str]] = {}
    try:
        for name in names:
            python = (pythons or {}).get(name, sys.executable)
            workers[name] = _start(python, name, folder, threads)
            answer = _ask(workers[name], "load")
            if "error" in answer:
                progress(f"{name}: {answer['error']}")
                workers.pop(name).kill()
                continue
            who[name], seen[name] = answer["versions"], []
            progress(f"{name}: loaded")
        ready()
        for _ in range(rounds):
            for name, worker in workers.items():
                seen[name].append(float(_ask(worker, "run")["milliseconds"]))
    finally:
        for worker in workers.values():
            worker.kill()
    return [Speed(name, threads, _dtype(name), tuple(seen[name]), who[name]) for name in seen]


def _start(python: str, name: str, folder: Path, threads: int) -> subprocess.Popen[str]:
    counts = ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **{variable: str(threads) for variable in counts}}
    root = str(Path(__file__).parent.parent.parent)
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [python, "-m", "harness.peers.speed", name, str(folder), str(threads)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _ask(worker: subprocess.Popen[str], word: str) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(word + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        return {"error": "its process ended"}
    answer: dict[str, Any] = json.loads(line)
    return answer


def _serve(name: str, folder: Path, threads: int, answers: TextIO) -> None:
    """Load one peer, then run it whenever a line asks for it."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    # Libraries that count the CPUs themselves see as many as the others are allowed.
    os.sched_setaffinity(0, cpus)
    import torch

    torch.set_num_threads(threads)
    forward: Callable[[], Array] | None = None
    for line in sys.stdin:
        if line.strip() == "load":
            try:
                forward = _loaded(name, folder)
                forward()
                answer: dict[str, Any] = {"versions": versions(name)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        else:
            assert forward is not None
            begun = time.perf_counter()
            forward()
            answer = {"milliseconds": 1e3 * (time.perf_counter() - begun)}
        print(json.dumps(answer), file=answers, flush=True)


def _loaded(name: str, folder: Path) -> Callable[[], Array]:
    checkpoint = materialise(MODEL, folder, "bfloat16")
    source = name if name == OWN else f"peer:{name}"
    loaded = load_subject(source, checkpoint, dtype=_dtype(name), target="llvm")
    if loaded.subject is None:
        raise BadInput(loaded.failure)
    vocabulary = MODEL.config["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, LENGTH)).astype(np.int32)
    subject = loaded.subject
    return lambda: subject.forward(ids)


if __name__ == "__main__":
    # What libraries print must not stand among the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), out)
