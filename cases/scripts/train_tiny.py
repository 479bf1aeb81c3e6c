"""Train `cases/checkpoints/mpt-tiny-english`, restartable and seeded.

Run from the repository's root: `python -m cases.scripts.train_tiny` and then
`python -m cases.scripts.report_tiny`. About ten minutes on two cores. Every hundred steps the
state is written to the work folder; a second start goes on from there. Batches depend on the step
alone, so a restarted run sees the same ones. Bits may still differ between processors and PyTorch
versions, so the report describes the weights that are committed, never those of a new run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cases.scripts import corpus
from cases.scripts.tiny_model import TinyMPT

NAME = "mpt-tiny-english"
HERE = Path(__file__).resolve().parent.parent
SEED, VOCAB, LENGTH, BATCH = 20230505, 1024, 256, 12
D_MODEL, N_HEADS, N_LAYERS, EXPANSION, MAX_SEQ_LEN, BIAS_MAX = 192, 12, 4, 4, 512, 8
HELD_OUT_BOOK, HELD_OUT_CHARACTERS = "persuasion", 24_000
HELD_OUT = HERE / "prompts" / "held-out" / "persuasion.txt"
TOKENIZER_NAME = "tokenizer.json"


def split(books: tuple[corpus.Book, ...]) -> tuple[str, str]:
    """(training text, held-out text); the last characters of one book are held out."""
    training, held_out = [], ""
    for book in books:
        text = book.text
        if book.name == HELD_OUT_BOOK:
            cut = text.index("\n\n", len(text) - HELD_OUT_CHARACTERS) + 2
            text, held_out = text[:cut], text[cut:]
        training.append(text)
    return "\n\n".join(training), held_out


def train_tokenizer(text: str, path: Path) -> None:
    """Byte-level BPE with every byte in the vocabulary, as GPT-NeoX-20B's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def encode(path: Path, text: str) -> Tensor:
    """Token ids (n,) of a whole text."""
    from tokenizers import Tokenizer

    return torch.tensor(Tokenizer.from_file(str(path)).encode(text).ids)


def new_model() -> TinyMPT:
    """Seeded initial weights: small embedding, gammas spread, a few outlier channels."""
    generator = torch.Generator().manual_seed(SEED)
    model = TinyMPT(D_MODEL, N_HEADS, N_LAYERS, EXPANSION, VOCAB, BIAS_MAX)
    for name, value in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                # Released checkpoints have gammas far from 1 and a few channels far from the rest.
                value.copy_(torch.exp(0.3 * noise))
                outliers = torch.randperm(D_MODEL, generator=generator)[:3]
                value[outliers] *= torch.tensor([4.0, -3.0, 6.0])
            elif name.endswith("wte.weight"):
                value.copy_(0.03 * noise)
            else:
                residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                value.copy_(noise * 0.7 / math.sqrt(value.shape[1]) * (0.4 if residual else 1.0))
    return model


def optimisers(model: TinyMPT) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; Adam for embedding and gammas, the latter without decay."""
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "wte" not in n]
    gammas = [p for p in named.values() if p.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"
    )
    adam = torch.optim.Adam(
        [
            {"params": [named["transformer.wte.weight"]], "lr": 4e-3},
            {"params": gammas, "lr": 1.5e-2},
        ],
        betas=(0.9, 0.97),
    )
    return [muon, adam]


def rate(step: int, steps: int) -> float:
    """Warm-up, flat, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / 20, max(0.02, (steps - step) / (0.5 * steps)))


def train(steps: int, work: Path) -> TinyMPT:
    """Train or go on training; returns the model after the last step."""
    training, _ = split(corpus.books(corpus.fetch(work / "corpus")))
    tokenizer = work / TOKENIZER_NAME
    if not tokenizer.is_file():
        train_tokenizer(training, tokenizer)
    ids = encode(tokenizer, training)
    print(f"{len(ids):,d} training tokens", flush=True)
    model = new_model()
    opts = optimisers(model)
    bases = [[group["lr"] for group in opt.param_groups] for opt in opts]
    state_file, first = work / "state.pt", 0
    if state_file.is_file():
        state: dict[str, Any] = torch.load(state_file, weights_only=False)
        if state["steps"] != steps:
            raise SystemExit(
                f"{state_file}: made for {state['steps']} steps, not {steps}; delete it"
            )
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
    start = time.monotonic()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(SEED + step)
        at = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[i : i + LENGTH + 1] for i in at.tolist()])
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, base in zip(opts, bases, strict=True):
            for group, lr in zip(opt.param_groups, base, strict=True):
                group["lr"] = lr * rate(step, steps)
            opt.step()
            opt.zero_grad()
        if (step + 1) % 25 == 0:
            pace = (time.monotonic() - start) / (step + 1 - first)
            print(f"step {step + 1} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            partial = state_file.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimisers": [opt.state_dict() for opt in opts],
                    "step": step + 1,
                    "steps": steps,
                },
                partial,
            )
            os.replace(partial, state_file)
    return model


def raw_config() -> dict[str, Any]:
    """mpt-7b-instruct's config.json with the sizes of this model."""
    published = json.loads((HERE / "configs" / "mpt-7b-instruct.json").read_text())
    return published | {
        "d_model": D_MODEL,
        "expansion_ratio": EXPANSION,
        "max_seq_len": MAX_SEQ_LEN,
        "n_heads": N_HEADS,
        "n_layers": N_LAYERS,
        "tokenizer_name": NAME,
        "vocab_size": VOCAB,
    }


def export(model: TinyMPT, work: Path, directory: Path) -> None:
    """Write bfloat16 weights in the hub layout, with config and tokenizer."""
    from cases.hub_layout import write_checkpoint

    arrays = {
        name: value.detach().to(torch.bfloat16).float().numpy()
        for name, value in model.state_dict().items()
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    write_checkpoint(
        directory, raw_config(), shapes, arrays.__getitem__, dtype="bfloat16", shards=2, fmt="bin"
    )
    (directory / TOKENIZER_NAME).write_bytes((work / TOKENIZER_NAME).read_bytes())
    settings = {
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": MAX_SEQ_LEN,
        "pad_token": "<|padding|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: list[str]) -> None:
    """Train, then write the checkpoint and the held-out excerpt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "checkpoints" / NAME)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = train(chosen.steps, chosen.work)
    _, held_out = split(corpus.books(corpus.fetch(chosen.work / "corpus")))
    HELD_OUT.write_text(held_out)
    export(model, chosen.work, chosen.output)


if __name__ == "__main__":
    main(sys.argv[1:])
