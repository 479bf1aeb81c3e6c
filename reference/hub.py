"""MPT as transformers runs it, whole or part by part, with its taps under the usual names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.mpt.modeling_mpt import MptForCausalLM

from reference.arithmetic import DTYPES
from reference.config import MPTConfig
from reference.honoured import IgnoredField, NotHonoured, hub_config, ignored_fields
from reference.orders import StorageName
from reference.topology import LAYER_PREFIX, topology
from reference.weights import Read, as_tensor

Ids: TypeAlias = Tensor | np.ndarray[tuple[int, ...], np.dtype[np.integer]]

__all__ = ["HubModel", "IgnoredField", "NotHonoured", "hub_config", "ignored_fields"]

WINDOW = 8
SCORES_AT_A_TIME = 1 << 25


class HubModel:
    """transformers' own MPT, called whole or part by part.

    Parameters
    ----------
    raw
        Parsed config.json with the original's names.
    read
        Original tensor name to array.
    storage
        Precision of weights and computation.
    device
        Where torch computes.

    Raises
    ------
    NotHonoured
        The config means something that transformers does not compute.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        read: Read,
        *,
        storage: StorageName = "float32",
        device: str = "cpu",
    ) -> None:
        ignored = ignored_fields(raw)
        if ignored:
            raise NotHonoured(ignored)
        self.config = MPTConfig.from_dict(raw)
        self.storage = storage
        self.device = device
        self.model = _load(self.config, read, storage, device)

    @torch.no_grad()
    def forward(self, ids: Ids) -> Tensor:
        """Return the logits (batch, sequence, vocab_size), by the deployed path."""
        return self.model(self._ids(ids)).logits

    @torch.no_grad()
    def embed(self, ids: Ids) -> dict[str, Tensor]:
        """Return ``transformer.wte`` and ``hidden``, which are the same: there are no positions."""
        rows = self.model.transformer.wte(self._ids(ids))
        return {"transformer.wte": rows, "hidden": rows}

    @torch.no_grad()
    def block(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Return every tap of one block, from a given stream (batch, sequence, d_model).

        The mask and the position bias are those that the model itself makes for this stream.
        """
        with self._only(layer) as block, _taps(block, self.config) as taps:
            self.model.transformer(inputs_embeds=self._stream(hidden))
        return taps

    @torch.no_grad()
    def head(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return ``transformer.norm_f`` and ``logits`` of the last stream."""
        norm_f = self.model.transformer.norm_f(self._stream(hidden))
        return {"transformer.norm_f": norm_f, "logits": self.model.lm_head(norm_f)}

    @torch.no_grad()
    def trace(self, ids: Ids) -> dict[str, Tensor]:
        """Run the deployed path once and return every tap under its full name, with the logits."""
        transformer = self.model.transformer
        with ExitStack() as stack:
            layers = [
                stack.enter_context(_taps(block, self.config)) for block in transformer.blocks
            ]
            ends: dict[str, Tensor] = {}
            stack.enter_context(_hook(transformer.wte, _keep(ends, "transformer.wte")))
            stack.enter_context(_hook(transformer.norm_f, _keep(ends, "transformer.norm_f")))
            logits = self.model(self._ids(ids)).logits
        taps = {"transformer.wte": ends["transformer.wte"]}
        for layer, inner in enumerate(layers):
            taps |= {LAYER_PREFIX.format(layer) + name: value for name, value in inner.items()}
        return taps | {"transformer.norm_f": ends["transformer.norm_f"], "logits": logits}

    @torch.no_grad()
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the attention of block 0, as deployed, on given queries, keys and values.

        Parameters
        ----------
        q
            (batch, queries, n_heads, head_dim); the queries are the last ones of the keys.
        k, v
            (batch, keys, n_heads, head_dim).

        Returns
        -------
        Tensor
            (batch, queries, n_heads * head_dim), before the output projection.
        """
        queries, keys = q.shape[1], k.shape[1]
        padded = torch.zeros_like(k)
        padded[:, keys - queries :] = q
        planted = torch.cat([t.flatten(2) for t in (padded, k, v)], dim=-1)
        planted = planted.to(self.device, DTYPES[self.storage])
        heads, pieces = self.config.n_heads, []
        together = max(1, SCORES_AT_A_TIME // (heads * keys * keys))
        for at in range(0, len(planted), together):
            pieces.append(self._attend(planted[at : at + together])[:, keys - queries :])
        return torch.cat(pieces)

    def _attend(self, planted: Tensor) -> Tensor:
        context: dict[str, Tensor] = {}
        with self._only(0) as block, ExitStack() as stack:
            stack.enter_context(_hook(block.attn.Wqkv, lambda *_: planted))
            keep = _keep(context, "context", of_input=True)
            stack.enter_context(_hook(block.attn.out_proj, keep))
            # What is planted stands for queries and keys after the clip.
            clip, block.attn.clip_qkv = block.attn.clip_qkv, None
            stream = torch.zeros(*planted.shape[:2], self.config.d_model)
            try:
                self.model.transformer(inputs_embeds=self._stream(stream))
            finally:
                block.attn.clip_qkv = clip
        return context["context"]

    @torch.no_grad()
    def attention_bias(self, query_length: int, key_length: int) -> Tensor:
        """Measure what the deployed attention adds to its scores.

        The fused projection of block 0 is replaced by zero queries and keys and one-hot values, so
        that the context is the softmax of the bias alone; a padding mask leaves a window of a few
        keys visible at a time, in which no probability underflows. Neighbouring windows share a
        key; logarithms of ratios within them are summed from the diagonal.

        Parameters
        ----------
        query_length, key_length
            Numbers of tokens; the queries are the last ones of the keys.

        Returns
        -------
        Tensor
            float64 (n_heads, query_length, key_length): 0 on the diagonal, minus infinity for the
            future.
        """
        if not 0 < query_length <= key_length <= self.config.max_seq_len:
            expected = f"0 < query_length <= key_length <= max_seq_len {self.config.max_seq_len}"
            raise ValueError(
                f"attention_bias: expected {expected}, found {query_length}, {key_length}"
            )
        width = min(WINDOW, self.config.head_dim)
        if width < 2 and key_length > 1:
            raise ValueError("attention_bias: expected head_dim of at least 2 to measure in")
        heads, first = self.config.n_heads, key_length - query_length
        steps = torch.zeros(heads, query_length, key_length, dtype=torch.float64)
        starts = range(0, key_length - 1, max(1, width - 1))
        together = max(1, SCORES_AT_A_TIME // (heads * key_length * key_length))
        for at in range(0, len(starts), together):
            group = starts[at : at + together]
            seen = self._windows(group, width, key_length)[:, :, first:].log()
            for start, row in zip(group, seen, strict=True):
                stop = min(start + width, key_length)
                steps[..., start : stop - 1] = (
                    row[..., 1 : stop - start] - row[..., : stop - start - 1]
                )
        past = torch.ones(query_length, key_length, dtype=torch.bool).tril(first - 1)
        steps = steps.masked_fill(~past, 0.0)
        # The step at key j leads from j to j + 1; what is left of the diagonal is minus their sum.
        bias = -steps.flip(-1).cumsum(-1).flip(-1)
        future = torch.ones(query_length, key_length, dtype=torch.bool).triu(first + 1)
        return bias.masked_fill(future, float("-inf"))

    def _windows(self, starts: range, width: int, keys: int) -> Tensor:
        """Return multiples of the probabilities, float64 (windows, heads, queries, width)."""
        config = self.config
        # A clip_qkv below 1 makes all values smaller alike, which no ratio sees.
        planted = torch.zeros(
            len(starts), keys, 3, config.n_heads, config.head_dim, dtype=DTYPES[self.storage]
        )
        visible = torch.zeros(len(starts), keys, dtype=torch.long)
        for row, start in enumerate(starts):
            for place in range(min(width, keys - start)):
                planted[row, start + place, 2, :, place] = 1
                visible[row, start + place] = 1
        planted = planted.flatten(2).to(self.device)
        context: dict[str, Tensor] = {}
        with self._only(0) as block, ExitStack() as stack:
            stack.enter_context(_hook(block.attn.Wqkv, lambda *_: planted))
            stack.enter_context(
                _hook(block.attn.out_proj, _keep(context, "context", of_input=True))
            )
            stream = torch.zeros(len(starts), keys, config.d_model)
            self.model.transformer(
                inputs_embeds=self._stream(stream), attention_mask=visible.to(self.device)
            )
        shape = (len(starts), keys, config.n_heads, config.head_dim)
        seen = context["context"].reshape(shape).transpose(1, 2)[..., :width]
        return seen.cpu().to(torch.float64)

    @contextmanager
    def _only(self, layer: int) -> Iterator[Any]:
        """Leave the model with one block, so that its own forward makes mask and bias for it."""
        transformer = self.model.transformer
        blocks = transformer.blocks
        transformer.blocks = nn.ModuleList([blocks[layer]])
        try:
            yield blocks[layer]
        finally:
            transformer.blocks = blocks

    def _ids(self, ids: Ids) -> Tensor:
        tensor = ids if isinstance(ids, Tensor) else torch.from_numpy(np.array(ids))
        return tensor.to(device=self.device, dtype=torch.long)

    def _stream(self, hidden: Tensor) -> Tensor:
        return hidden.to(device=self.device, dtype=DTYPES[self.storage])


def _load(config: MPTConfig, read: Read, storage: str, device: str) -> Any:
    with torch.device("meta"):
        model = MptForCausalLM(hub_config(config)).eval()
    state = {
        name: as_tensor(read(name), storage=storage, device=device) for name in topology(config)
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    return model


Hook: TypeAlias = Callable[[Any, tuple[Any, ...], Any], Any]


@contextmanager
def _hook(module: Any, hook: Hook) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _keep(taps: dict[str, Tensor], name: str, *, of_input: bool = False) -> Hook:
    def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        taps[name] = inputs[0] if of_input else output

    return hook


@contextmanager
def _taps(block: Any, config: MPTConfig) -> Iterator[dict[str, Tensor]]:
    """Collect the taps of a block while it runs, in the order of its computation."""
    taps: dict[str, Tensor] = {}

    def fused(_: Any, __: tuple[Any, ...], output: Tensor) -> None:
        # A hook sits before the clamp; the tap after it.
        clip = config.clip_qkv
        taps["attn.Wqkv"] = output if clip is None else output.clamp(min=-clip, max=clip)

    def last(_: Any, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        taps["output"] = output[0]

    with ExitStack() as stack:
        for module, hook in (
            (block.norm_1, _keep(taps, "norm_1")),
            (block.attn.Wqkv, fused),
            (block.attn.out_proj, _keep(taps, "attn.context", of_input=True)),
            (block.attn.out_proj, _keep(taps, "attn.out_proj")),
            (block.norm_2, _keep(taps, "attn.residual", of_input=True)),
            (block.norm_2, _keep(taps, "norm_2")),
            (block.ffn.up_proj, _keep(taps, "ffn.up_proj")),
            (block.ffn.act, _keep(taps, "ffn.act")),
            (block.ffn.down_proj, _keep(taps, "ffn.down_proj")),
            (block, last),
        ):
            stack.enter_context(_hook(module, hook))
        yield taps
