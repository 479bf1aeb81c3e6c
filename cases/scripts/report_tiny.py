"""Measure `cases/checkpoints/mpt-tiny-english` and write its report.json and README.md.

Everything is computed in float64 from the committed bfloat16 weights and the committed held-out
excerpt, so that no corpus is needed to check the numbers; only the unigram model comes from the
training text, through the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cases.scripts import corpus, train_tiny
from cases.scripts.tiny_model import SLOPE_RULES, TinyMPT

WINDOW = 256


def load(directory: Path) -> TinyMPT:
    """The committed weights, widened to float64."""
    raw = json.loads((directory / "config.json").read_text())
    model = TinyMPT(
        raw["d_model"],
        raw["n_heads"],
        raw["n_layers"],
        raw["expansion_ratio"],
        raw["vocab_size"],
        raw["attn_config"]["alibi_bias_max"],
    ).double()
    state: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("pytorch_model-*.bin")):
        state |= torch.load(shard, weights_only=True)
    model.load_state_dict({name: value.double() for name, value in state.items()})
    return model


def windows(ids: Tensor, length: int) -> Tensor:
    """Consecutive stretches of length + 1 ids, each starting at its predecessor's last id."""
    count = (len(ids) - 1) // length
    return torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])


@torch.no_grad()
def losses(model: TinyMPT, batch: Tensor, rule: str = "mpt") -> list[float]:
    """Mean next-token loss (nats) of each row of `batch` (n, length + 1)."""
    out = []
    for row in batch:
        logits = model(row[None, :-1], rule)[0]
        out.append(float(functional.cross_entropy(logits, row[1:])))
    return out


@torch.no_grad()
def activations(model: TinyMPT, batch: Tensor) -> dict[str, float]:
    """Largest magnitude at each tap, over all rows."""
    largest: dict[str, float] = {}

    def tap(name: str, value: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

    model(batch[:, :-1], "mpt", tap)
    return {name: round(value, 3) for name, value in largest.items()}


@torch.no_grad()
def scores(model: TinyMPT, batch: Tensor) -> float:
    """Largest magnitude of q k^T before scaling; the original's order makes float16 hold it."""
    largest = 0.0

    def tap(name: str, value: Tensor) -> None:
        nonlocal largest
        if name.endswith("Wqkv"):
            b, s, _ = value.shape
            q, k, _ = value.view(b, s, 3, model.n_heads, -1).permute(2, 0, 3, 1, 4)
            largest = max(largest, float((q @ k.transpose(-1, -2)).tril().abs().max()))

    model(batch[:4, :-1], "mpt", tap)
    return round(largest, 3)


def unigram_loss(training: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Held-out loss of the training text's unigram frequencies, each count plus one."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return float(-torch.log(counts / counts.sum())[held_out].mean())


def gammas(model: TinyMPT) -> dict[str, dict[str, float]]:
    """Spread of each norm's weight."""
    return {
        name: {
            "mean": round(float(value.mean()), 4),
            "std": round(float(value.std()), 4),
            "min": round(float(value.min()), 4),
            "max": round(float(value.max()), 4),
        }
        for name, value in model.state_dict().items()
        if value.ndim == 1
    }


def measure(directory: Path, work: Path) -> dict[str, Any]:
    """All figures of the report."""
    model = load(directory)
    tokenizer = directory / train_tiny.TOKENIZER_NAME
    training, held_out = train_tiny.split(corpus.books(corpus.fetch(work / "corpus")))
    excerpt = train_tiny.HELD_OUT.read_text()
    if excerpt != held_out:
        raise SystemExit("cases/prompts/held-out/persuasion.txt is not what the corpus holds out")
    ids, seen = train_tiny.encode(tokenizer, held_out), train_tiny.encode(tokenizer, training)
    batch = windows(ids, WINDOW)
    by_rule = {rule: losses(model, batch, rule) for rule in SLOPE_RULES}
    full = losses(model, windows(ids, train_tiny.MAX_SEQ_LEN))
    with torch.no_grad():
        guesses = model(batch[:8, :-1]).argmax(-1)
    embedding = model.transformer.wte.weight
    return {
        "checkpoint": train_tiny.NAME,
        "parameters": sum(value.numel() for value in model.parameters()),
        "training_tokens_in_text": len(seen),
        "training_book_licence": corpus.LICENCE,
        "held_out_tokens": len(ids),
        "window": WINDOW,
        "loss": sum(by_rule["mpt"]) / len(batch),
        "loss_by_window": by_rule["mpt"],
        "loss_at_full_length": sum(full) / len(full),
        "loss_by_slope_rule": {rule: sum(v) / len(v) for rule, v in by_rule.items()},
        "unigram_loss": unigram_loss(seen, ids[1:], len(embedding)),
        "argmax_is_right": float((guesses == batch[:8, 1:]).double().mean()),
        "argmax_is_the_input": float((guesses == batch[:8, :-1]).double().mean()),
        "embedding_std": float(embedding.detach().std()),
        "gammas": gammas(model),
        "largest_unscaled_score": scores(model, batch),
        "largest_activation": activations(model, batch),
    }


def readme(figures: dict[str, Any]) -> str:
    """The README, from the figures alone."""
    rules = figures["loss_by_slope_rule"]
    norms = "\n".join(
        f"| `{name}` | {g['mean']:.2f} | {g['std']:.2f} | {g['min']:.2f} | {g['max']:.2f} |"
        for name, g in figures["gammas"].items()
    )
    taps = "\n".join(f"| `{n}` | {v:g} |" for n, v in figures["largest_activation"].items())
    return f"""# {figures["checkpoint"]}

A trained MPT of {figures["parameters"]:,d} parameters, in the layout in which MPT was first
published: `config.json` with every original field, two `pytorch_model-0000X-of-00002.bin` shards in
bfloat16 with their index, and a byte-level BPE tokenizer. {train_tiny.N_HEADS} heads (no power of
two: the interleaving of the slopes shows), dimension {train_tiny.D_MODEL // train_tiny.N_HEADS}.

Made by `python -m cases.scripts.train_tiny`, described by `python -m cases.scripts.report_tiny`,
which wrote this file and `report.json`. Do not edit either.

**Text and licence.** Six novels of Jane Austen: {figures["training_book_licence"]},
read from Debian's `{corpus.PACKAGE}`. The text is not committed, except the last part of
*Persuasion*, which was held out of training (`cases/prompts/held-out/persuasion.txt`,
{figures["held_out_tokens"]:,d} tokens). The weights and the tokenizer are under the licence of this
project.

**Loss** (nats a token, float64, windows of {figures["window"]} tokens):

| | held-out loss |
|---|---|
| unigram frequencies of the training text | {figures["unigram_loss"]:.3f} |
| the model | **{figures["loss"]:.3f}** |
| the model, windows of {train_tiny.MAX_SEQ_LEN} | {figures["loss_at_full_length"]:.3f} |
| same weights without ALiBi | {rules["none"]:.3f} |
| same weights, slopes 1/m^2 | {rules["inverse-square"]:.3f} |
| same weights, slopes not interleaved | {rules["not-interleaved"]:.3f} |

The arg max is the right token for {figures["argmax_is_right"]:.1%} and the input token itself for
{figures["argmax_is_the_input"]:.1%} of the positions. Standard deviation of the embedding:
{figures["embedding_std"]:.4f}. Largest unscaled score: {figures["largest_unscaled_score"]:g}.

The gammas were initialised with a spread (0.3 in the log, three outlier channels in each norm) and
trained from there; the outliers of released models are imitated, not grown.

| gammas | mean | std | min | max |
|---|---|---|---|---|
{norms}

| tap | largest activation |
|---|---|
{taps}
"""


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    directory = train_tiny.HERE / "checkpoints" / train_tiny.NAME
    figures = measure(directory, chosen.work)
    (directory / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (directory / "README.md").write_text(readme(figures))
    print(readme(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
