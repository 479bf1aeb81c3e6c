"""An MPT of one's own, in numpy, offered to ``mpt-conform check``.

    mpt-conform check --subject examples.own_mpt:load
    mpt-conform check --subject examples.own_mpt:load_faulty    # exit code 1, and why

Weights and everything a sub-module returns are held in the storage dtype; sums, scores,
probabilities and softmax stay in float32. docs/own-subject.md explains each part.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from harness.subjects.protocol import Rounding

Array = np.ndarray[Any, Any]
_erf = np.frompyfunc(math.erf, 1, 1)


def read_weights(checkpoint: Path, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Return every tensor of the checkpoint, rounded to the storage dtype once."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(checkpoint.glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return {name: tensor.float().numpy().astype(dtype) for name, tensor in tensors.items()}


def alibi_slopes(n_heads: int, bias_max: float) -> Array:
    """Return 2^(-m) for m = bias_max/N .. bias_max, N the next power of two; odd ones first."""
    power = 2 ** math.ceil(math.log2(n_heads))
    slopes = 2.0 ** (-bias_max * np.arange(1, power + 1) / power)
    return slopes if power == n_heads else np.concatenate([slopes[1::2], slopes[::2]])[:n_heads]


class OwnMPT:
    """The subject: everything but ``forward`` is optional, and sharpens the verdict."""

    name = "own-numpy"
    rounding = Rounding(scores="float32", probabilities="float32")

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self.dtype = dtype
        self._storage = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._weights = read_weights(checkpoint, self._storage)
        config = json.loads((checkpoint / "config.json").read_text())
        attention = config.get("attn_config", {})
        if not attention.get("alibi") or attention.get("qk_ln"):
            raise NotImplementedError("only ALiBi without qk_ln is implemented")
        self._layers, self._heads = config["n_layers"], config["n_heads"]
        self._width = config["d_model"] // self._heads
        self._clip = attention.get("clip_qkv")
        self._scale = attention.get("softmax_scale") or 1.0 / math.sqrt(self._width)
        self.slopes = alibi_slopes(self._heads, attention.get("alibi_bias_max", 8))

    def forward(self, input_ids: Array, lengths: Array | None = None) -> Array:
        """Return logits (batch, seq, vocab): what users call."""
        hidden = self.embed(input_ids)["transformer.wte"]
        for layer in range(self._layers):
            hidden = self.block(layer, hidden)["output"]
        return self.head(hidden)["logits"]

    def embed(self, input_ids: Array) -> dict[str, Array]:
        """Return the rows of the embedding."""
        return {"transformer.wte": self._weights["transformer.wte.weight"][input_ids]}

    def block(self, layer: int, hidden_states: Array) -> dict[str, Array]:
        """Return every tap of one block, named by its module path inside the block."""
        at = f"transformer.blocks.{layer}."
        taps: dict[str, Array] = {}
        taps["norm_1"] = self._norm(at + "norm_1", hidden_states)
        fused = self._linear(at + "attn.Wqkv", taps["norm_1"])
        taps["attn.Wqkv"] = np.clip(fused, -self._clip, self._clip) if self._clip else fused
        taps["attn.context"] = self._attend(taps["attn.Wqkv"])
        taps["attn.out_proj"] = self._linear(at + "attn.out_proj", taps["attn.context"])
        taps["attn.residual"] = self._add(hidden_states, taps["attn.out_proj"])
        taps["norm_2"] = self._norm(at + "norm_2", taps["attn.residual"])
        taps["ffn.up_proj"] = self._linear(at + "ffn.up_proj", taps["norm_2"])
        taps["ffn.act"] = self._gelu(taps["ffn.up_proj"])
        taps["ffn.down_proj"] = self._linear(at + "ffn.down_proj", taps["ffn.act"])
        taps["output"] = self._add(taps["attn.residual"], taps["ffn.down_proj"])
        return taps

    def head(self, hidden_states: Array) -> dict[str, Array]:
        """Return the final norm, and the logits in float32."""
        last = self._norm("transformer.norm_f", hidden_states)
        table = self._weights["transformer.wte.weight"]
        return {
            "transformer.norm_f": last,
            "logits": last.astype(np.float32) @ table.T.astype(np.float32),
        }

    def attention_bias(self, query_length: int, key_length: int) -> Array:
        """Return the bias (heads, query, key) that attention adds: the same call, not a copy."""
        keys = np.arange(key_length)
        queries = keys[key_length - query_length :]
        distance = (queries[:, None] - keys[None, :]).astype(np.float32)
        return -self.slopes.astype(np.float32)[:, None, None] * distance

    def parameters(self) -> dict[str, Array]:
        """Return the weights as they are held, so that each can be proved to have arrived."""
        return self._weights

    def _attend(self, fused: Array) -> Array:
        batch, length, rows = fused.shape
        pairs = (rows // self._width - self._heads) // 2
        heads = fused.astype(np.float32).reshape(batch, length, -1, self._width).swapaxes(1, 2)
        q, k, v = np.split(heads, [self._heads, self._heads + pairs], axis=1)
        k, v = (np.repeat(x, self._heads // pairs, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(2, 3) * np.float32(self._scale)
        scores += self.attention_bias(length, length)
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights @ v / weights.sum(-1, keepdims=True)
        return self._round(context.swapaxes(1, 2).reshape(batch, length, -1))

    def _round(self, wide: Array) -> Array:
        return wide.astype(self._storage)

    def _linear(self, name: str, x: Array) -> Array:
        result = x.astype(np.float32) @ self._weights[name + ".weight"].T.astype(np.float32)
        bias = self._weights.get(name + ".bias")
        return self._round(result if bias is None else result + bias.astype(np.float32))

    def _norm(self, name: str, x: Array) -> Array:
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        result = centred / np.sqrt(variance + np.float32(1e-5))
        result *= self._weights[name + ".weight"].astype(np.float32)
        bias = self._weights.get(name + ".bias")
        return self._round(result if bias is None else result + bias.astype(np.float32))

    def _gelu(self, x: Array) -> Array:
        wide = x.astype(np.float32)
        erf = _erf(wide / np.float32(math.sqrt(2.0))).astype(np.float32)
        return self._round(wide * np.float32(0.5) * (1 + erf))

    def _add(self, stream: Array, update: Array) -> Array:
        return self._round(stream.astype(np.float32) + update.astype(np.float32))


def load(checkpoint: Path, *, dtype: str, target: str) -> OwnMPT:
    """Make the subject; ``target`` is for subjects that are compiled."""
    return OwnMPT(checkpoint, dtype)


def load_faulty(checkpoint: Path, *, dtype: str, target: str) -> OwnMPT:
    """Make one with a mistake that a published port really made: slopes 1/m^2."""
    subject = OwnMPT(checkpoint, dtype)
    subject.slopes = 1.0 / np.square(np.log2(subject.slopes))
    return subject
