"""``trace``: every tap of a subject in a file, as ``check --traces`` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import NotProven
from harness.faults.library import parse
from harness.inputs import load_cases
from harness.measure.oracle import Oracle
from harness.measure.run import ALIBI_KEYS, ALIBI_QUERIES, Case
from harness.measure.taps import BLOCK_PREFIX, block_widths, embed_widths, head_widths, shapes
from harness.measure.traces import ALIBI, DEPLOYED, IDS
from harness.pipeline import Request, open_material
from harness.report.files import replacing, require_writable
from harness.subjects.calls import SubjectFailure, call_array, call_bias, call_taps
from harness.subjects.load import load_subject
from harness.subjects.protocol import Array, capabilities, rounding_of


def write_dump(
    request: Request, path: Path, progress: Callable[[str], None] = lambda text: None
) -> int:
    """Run a subject freely and write what it computes.

    Taps come from the chain ``embed`` -> ``block`` ... -> ``head``; ``forward`` holds the logits of
    the deployed function, which has no taps. A subject without the chain is dumped as ``logits``
    alone. Arrays keep the dtype in which the subject returned them.

    Parameters
    ----------
    request
        What to run, on what.
    path
        Safetensors file to write; complete or not at all.
    progress
        Called with a sentence before each part.

    Returns
    -------
    int
        Number of tensors written.

    Raises
    ------
    BadInput
        If checkpoint, prompts, options or the place of the file cannot be used.
    NotProven
        If the subject fails, or its device is not there: then there is nothing to dump.
    """
    require_writable(path)
    material = open_material(request.checkpoint)
    checkpoint, config = material.checkpoint, material.config
    fault = parse(request.fault, config.n_layers) if request.fault is not None else None
    cases = load_cases(request.prompts, config, request.checkpoint, max_tokens=request.max_tokens)
    progress(f"loading {request.subject}")
    loaded = load_subject(
        request.subject,
        request.checkpoint,
        dtype=request.dtype,
        target=request.target,
        fault=fault,
    )
    subject = loaded.subject
    if subject is None:
        raise NotProven(loaded.failure, hint="nothing was dumped")
    oracle = Oracle(config, checkpoint.read, storage=subject.dtype, rounding=rounding_of(subject))
    arrays: dict[str, Array] = {}
    try:
        for number, case in enumerate(cases):
            progress(f"case {number + 1} of {len(cases)}")
            arrays[f"{case.name}/{IDS}"] = case.ids
            for tap, array in _run(subject, oracle, case, with_bias=number == 0):
                arrays[f"{case.name}/{tap}"] = array
    except SubjectFailure as failure:
        raise NotProven(str(failure), where=subject.name, hint="nothing was dumped") from failure
    metadata = {
        "subject": subject.name + (f" with fault {fault.label}" if fault else ""),
        "dtype": subject.dtype,
        "checkpoint": checkpoint.digest,
        "target": request.target,
        **asdict(rounding_of(subject)),
    }
    _write(path, arrays, metadata)
    return len(arrays)


def _run(
    subject: Any, oracle: Oracle, case: Case, *, with_bias: bool
) -> Iterator[tuple[str, Array]]:
    """Yield the taps of one case in order of evaluation."""
    config, offers = oracle.config, capabilities(subject)
    size = (int(case.ids.shape[0]), int(case.ids.shape[1]))
    hidden: Array | None = None
    if "embed" in offers:
        taps = call_taps("embed()", subject.embed, (case.ids,), shapes(embed_widths(config), *size))
        yield from taps.items()
        hidden = oracle.first_stream(taps)
    if with_bias and "attention_bias" in offers:
        yield ALIBI, _bias(subject, config)
    if hidden is not None and "block" in offers:
        expected = shapes(block_widths(config), *size)
        for layer in range(config.n_layers):
            taps = call_taps(f"block({layer})", subject.block, (layer, hidden), expected)
            yield from ((f"{BLOCK_PREFIX}.{layer}.{tap}", taps[tap]) for tap in taps)
            hidden = taps["output"]
    else:
        hidden = None
    if hidden is not None and "head" in offers:
        expected = shapes(head_widths(config), *size)
        yield from call_taps("head()", subject.head, (hidden,), expected).items()
    deployed = call_array("forward()", subject.forward, (case.ids,), (*size, config.vocab_size))
    chained = hidden is not None and "head" in offers
    yield DEPLOYED if chained else "logits", deployed


def _bias(subject: Any, config: Any) -> Array:
    keys = min(config.max_seq_len, ALIBI_KEYS)
    queries = min(ALIBI_QUERIES, keys)
    bias = call_bias(subject, config.n_heads, queries, keys)
    return np.broadcast_to(bias, (config.n_heads, queries, keys))


def _write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under its name only when it is complete."""
    import torch
    from safetensors.torch import save_file

    def tensor(array: Array) -> Any:
        whole = np.array(array, order="C")
        if whole.dtype.name == "bfloat16":
            return torch.from_numpy(whole.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(whole)

    with replacing(path) as unfinished:
        save_file(
            {key: tensor(array) for key, array in arrays.items()},
            str(unfinished),
            metadata=dict(metadata),
        )
