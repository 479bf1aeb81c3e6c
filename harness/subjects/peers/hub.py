"""transformers' MPT as its users load it, and the parts of it that a graph can be made of."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoint.dtypes import BY_NAME
from harness.checkpoint.reader import Checkpoint
from harness.errors import BadInput
from harness.subjects.protocol import Array

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def reference_config(checkpoint: Path) -> Any:
    """Return what the config means to the original.

    Raises
    ------
    BadInput
        If it is no MPT at all.
    """
    from reference.config import ConfigError, MPTConfig

    try:
        return MPTConfig.from_dict(Checkpoint.open(checkpoint).config)
    except ConfigError as error:
        raise BadInput(str(error), where=str(checkpoint / "config.json")) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from listing on stderr what it does not use; the taps say it."""
    logger = logging.getLogger("transformers")
    level, disabled = logger.level, logger.disabled
    logger.setLevel(logging.ERROR)
    logger.disabled = True
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = disabled


def load_model(checkpoint: Path, dtype: str) -> Any:
    """Return ``MptForCausalLM.from_pretrained`` of a checkpoint, in a storage dtype.

    What it raises, as for a config that its strict types do not take, is its refusal.
    """
    from transformers import MptForCausalLM

    from harness.subjects.peers.progress import no_bars

    with quiet(), no_bars():
        model = MptForCausalLM.from_pretrained(
            checkpoint, dtype=TORCH[dtype], attn_implementation="eager", local_files_only=True
        )
    return model.eval().requires_grad_(False)


class _Recorder(nn.Module):
    """Runs a module, and remembers what went in and what came out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.seen[:] = [x, y]
        return y


def _shell(module: nn.Module, **children: nn.Module) -> Any:
    """Return a module that shares everything with another one but some of its children."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = {**module._modules, **children}
    return shell


class Whole(nn.Module):
    """The model from ids to logits, as it is called."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the logits."""
        return (self.model(input_ids=ids, use_cache=False).logits,)


class Embedding(nn.Module):
    """The embedding table."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wte = model.transformer.wte

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the rows."""
        return (self.wte(ids),)


class Head(nn.Module):
    """Final norm and unembedding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_f = model.transformer.norm_f
        self.lm_head = model.lm_head

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the normed stream and the logits."""
        norm_f = self.norm_f(hidden)
        return norm_f, self.lm_head(norm_f)


class Block(nn.Module):
    """One block: the model's own forward with this block alone, its taps as outputs.

    Mask and position bias are those that the model itself makes.
    """

    taps = (
        "norm_1",
        "attn.Wqkv",
        "attn.context",
        "attn.out_proj",
        "attn.residual",
        "norm_2",
        "ffn.up_proj",
        "ffn.act",
        "ffn.down_proj",
        "output",
    )

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        whole = model.transformer
        block = whole.blocks[layer]
        record = {
            "norm_1": _Recorder(block.norm_1),
            "Wqkv": _Recorder(block.attn.Wqkv),
            "out_proj": _Recorder(block.attn.out_proj),
            "norm_2": _Recorder(block.norm_2),
            "up_proj": _Recorder(block.ffn.up_proj),
            "act": _Recorder(block.ffn.act),
            "down_proj": _Recorder(block.ffn.down_proj),
        }
        attn = _shell(block.attn, Wqkv=record["Wqkv"], out_proj=record["out_proj"])
        # A cache has an entry for each layer; there is none here, so that the index says nothing.
        ffn = _shell(
            block.ffn, up_proj=record["up_proj"], act=record["act"], down_proj=record["down_proj"]
        )
        inner = _shell(block, norm_1=record["norm_1"], norm_2=record["norm_2"], attn=attn, ffn=ffn)
        # The last norm is not part of the block.
        self.transformer = _shell(whole, blocks=nn.ModuleList([inner]), norm_f=nn.Identity())
        self.clip = block.attn.clip_qkv
        self.record = record

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the taps, in the order of `taps`."""
        output = self.transformer(inputs_embeds=hidden, use_cache=False).last_hidden_state
        seen = {name: recorder.seen for name, recorder in self.record.items()}
        fused = seen["Wqkv"][1]
        if self.clip:
            # A module ends before the clamp; the tap stands after it.
            fused = fused.clamp(min=-self.clip, max=self.clip)
        return (
            seen["norm_1"][1],
            fused,
            seen["out_proj"][0],
            seen["out_proj"][1],
            seen["norm_2"][0],
            seen["norm_2"][1],
            seen["up_proj"][1],
            seen["act"][1],
            seen["down_proj"][1],
            output,
        )


def named_taps(config: Any, values: Any) -> dict[str, Any]:
    """Return the taps of a block by name, with those that the config promises besides.

    Where the model has no norms of queries and keys, its queries and keys are what stands there.
    """
    taps = dict(zip(Block.taps, values, strict=True))
    if config.qk_ln:
        fused, width = taps["attn.Wqkv"], config.d_model
        taps["attn.q_ln"] = fused[..., :width]
        taps["attn.k_ln"] = fused[..., width : width + config.kv_n_heads * config.head_dim]
    return taps


def held(tensor: Any) -> Array:
    """Return a parameter as an array of its own dtype."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(BY_NAME["bfloat16"].numpy))
    return np.asarray(tensor.numpy())
