"""Faults of the weight mapper: the right tensor in the wrong place, form or type.

Every one of them still uses each tensor of the checkpoint exactly once, so that loading succeeds
and it takes the content to notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from harness.faults.model import Fault

_PORT = "https://github.com/mlc-ai/mlc-llm/pull/460"
_DTYPE = "https://github.com/mlc-ai/mlc-llm/pull/460 (commit ffed1d51)"

Change = Callable[[Any, Any], Any]
Mutation = Callable[[Any, Any, int | None], Any]


def _names(config: Any, layer: int | None, tensor: str) -> list[str]:
    """Return the full names of a tensor: of the blocks concerned, or of what lies outside them."""
    if tensor.startswith(("transformer.", "lm_head.")):
        return [tensor]
    layers = range(config.n_layers) if layer is None else [layer]
    return [f"transformer.blocks.{i}.{tensor}" for i in layers]


def changed(change: Change, *tensors: str) -> Mutation:
    """Return a mutation that stores ``change(array, config)`` instead of the array."""

    def mutate(weight_map: Any, config: Any, layer: int | None) -> Any:
        functions = dict(weight_map.map_func)
        for tensor in tensors:
            for name in _names(config, layer, tensor):
                if name in functions:
                    functions[name] = _before(functions[name], change, config)
        return replace(weight_map, map_func=functions)

    return mutate


def _before(store: Callable[..., Any], change: Change, config: Any) -> Callable[..., Any]:
    return lambda array: store(change(np.array(array), config))


def _exchanged(first: str, second: str) -> Mutation:
    """Return a mutation that lets two tensors of a block, equal in shape, change places."""

    def mutate(weight_map: Any, config: Any, layer: int | None) -> Any:
        sources = dict(weight_map.param_map)
        for a, b in zip(_names(config, layer, first), _names(config, layer, second), strict=True):
            sources[a], sources[b] = sources[b], sources[a]
        return replace(weight_map, param_map=sources)

    return mutate


def _between_layers(pick: Callable[[int, int], int], prefix: str = "") -> Mutation:
    """Return a mutation that gives layer i the tensors of layer ``pick(i, n_layers)``.

    Confined to one layer, that layer and the one it takes from change places.
    """

    def mutate(weight_map: Any, config: Any, layer: int | None) -> Any:
        n = config.n_layers
        origin = {i: pick(i, n) % n for i in range(n)}
        if layer is not None:
            other = origin[layer]
            origin = {i: i for i in range(n)} | {layer: other, other: layer}
        sources = dict(weight_map.param_map)
        for name in sources:
            head, _, rest = name.partition("transformer.blocks.")
            if head or not rest:
                continue
            index, _, tensor = rest.partition(".")
            if tensor.startswith(prefix):
                sources[name] = (f"transformer.blocks.{origin[int(index)]}.{tensor}",)
        return replace(weight_map, param_map=sources)

    return mutate


def _zero(rows: Callable[[int], slice]) -> Change:
    def change(array: Any, config: Any) -> Any:
        array[rows(len(array))] = 0
        return array

    return change


def _as_other_bits(array: Any, config: Any) -> Any:
    """Take the bits of bfloat16 for float16."""
    import ml_dtypes

    bits = array.astype(ml_dtypes.bfloat16).view(np.float16).astype(np.float32)
    return np.where(np.isfinite(bits), bits, 0)


def _truncated(array: Any, config: Any) -> Any:
    """Cut the low half of float32 off instead of rounding, two bits short of bfloat16."""
    bits = array.astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFC0000)).view(np.float32)


def _as_int8(array: Any, config: Any) -> Any:
    """Quantise every row to 8 bits and back."""
    wide = array.astype(np.float32)
    step = np.abs(wide).max(axis=-1, keepdims=True) / 127
    return np.round(wide / np.where(step == 0, 1, step)) * step


def _transposed(array: Any, config: Any) -> Any:
    return np.ascontiguousarray(array.T)


def tiled(array: Any, config: Any) -> Any:
    """Overwrite the second half with the first, as a rank that loads shard 0 twice."""
    half = len(array) // 2
    array[half : 2 * half] = array[:half]
    return array


def _columns_tiled(array: Any, config: Any) -> Any:
    half = array.shape[1] // 2
    array[:, half : 2 * half] = array[:, :half]
    return array


def _without_column(array: Any, config: Any) -> Any:
    array[:, array.shape[1] // 3] = 0
    return array


def _absent(array: Any, config: Any) -> Any:
    return np.zeros_like(array)


def _first_head(array: Any, config: Any) -> Any:
    """Give every head the gains of head 0."""
    return np.tile(array[: config.head_dim], len(array) // config.head_dim)


def _columns_by_channel(array: Any, config: Any) -> Any:
    """Read input features that are (head, channel) as if they were (channel, head)."""
    heads, dim = config.n_heads, config.head_dim
    return array.reshape(-1, heads, dim).swapaxes(1, 2).reshape(array.shape)


def _as_text(layer: int, n_layers: int) -> int:
    """Return the layer that stands in the place of ``layer`` when names are sorted as text."""
    return sorted(range(n_layers), key=str)[layer]


def _one_digit(layer: int, n_layers: int) -> int:
    """Exchange layers 1 and 10, as a lookup of ``blocks.1`` in the wrong order of names would."""
    return {1: 10, 10: 1}.get(layer, layer)


def _memory_exchanged(weight_map: Any, config: Any, layer: int | None) -> Any:
    """Fill up_proj with the elements of down_proj and the other way round."""
    swapped = _exchanged("ffn.up_proj.weight", "ffn.down_proj.weight")(weight_map, config, layer)
    return changed(
        lambda a, c: a.reshape(a.shape[::-1]), "ffn.up_proj.weight", "ffn.down_proj.weight"
    )(swapped, config, layer)


_GAINS = ("norm_1.weight", "norm_2.weight")
_MATRICES = (
    "attn.Wqkv.weight",
    "attn.out_proj.weight",
    "ffn.up_proj.weight",
    "ffn.down_proj.weight",
)


def fault(
    name: str,
    first_tap: str,
    summary: str,
    weights: Mutation,
    evidence: str = "invented",
    exposure: str = "trained",
    **more: Any,
) -> Fault:
    """Return a fault of this area."""
    return Fault(name, "weights", evidence, exposure, first_tap, summary, weights=weights, **more)


FAULTS: tuple[Fault, ...] = (
    fault(
        "norm-gammas-ones",
        "norm_1",
        "the gains of the block norms are overwritten by ones",
        changed(lambda a, c: np.ones_like(a), *_GAINS),
        _PORT,
    ),
    fault(
        "norm-f-gamma-ones",
        "transformer.norm_f",
        "the gain of the final norm is overwritten by ones",
        changed(lambda a, c: np.ones_like(a), "transformer.norm_f.weight"),
        _PORT,
    ),
    fault(
        "norm-gamma-plus-one",
        "norm_1",
        "gains are stored as gamma + 1, as layer_norm_1p does",
        changed(lambda a, c: a.astype(np.float32) + 1, *_GAINS),
        "https://github.com/NVIDIA/NeMo/pull/6804",
    ),
    fault(
        "norm-1-norm-2-swapped",
        "norm_1",
        "norm_1 and norm_2 change places, as binding by position would do",
        _exchanged("norm_1.weight", "norm_2.weight"),
        _PORT,
    ),
    fault(
        "norm-gamma-reversed",
        "norm_1",
        "the gains are read from the end",
        changed(lambda a, c: a[::-1], *_GAINS),
    ),
    fault(
        "norm-gamma-mean",
        "norm_1",
        "every gain is replaced by their mean, a scalar broadcast",
        changed(lambda a, c: np.full(a.shape, a.astype(np.float32).mean()), *_GAINS),
    ),
    fault(
        "out-proj-transposed",
        "attn.out_proj",
        "out_proj, the only square matrix, is transposed",
        changed(_transposed, "attn.out_proj.weight"),
    ),
    fault(
        "out-proj-shard-zero-twice",
        "attn.out_proj",
        "both halves of the input features come from the first tensor-parallel shard",
        changed(_columns_tiled, "attn.out_proj.weight"),
    ),
    fault(
        "up-proj-next-layer",
        "ffn.up_proj",
        "up_proj is taken from the next layer",
        _between_layers(lambda i, n: i + 1, "ffn.up_proj"),
    ),
    fault(
        "down-proj-next-layer",
        "ffn.down_proj",
        "down_proj is taken from the next layer",
        _between_layers(lambda i, n: i + 1, "ffn.down_proj"),
    ),
    fault(
        "up-proj-down-proj-memory",
        "ffn.up_proj",
        "up_proj and down_proj, equal in size, are stored in each other's place",
        _memory_exchanged,
        _PORT,
    ),
    fault(
        "layers-reversed",
        "norm_1",
        "layers are loaded from the last to the first",
        _between_layers(lambda i, n: n - 1 - i),
    ),
    fault(
        "layers-off-by-one",
        "norm_1",
        "layer i gets the tensors of layer i + 1",
        _between_layers(lambda i, n: i + 1),
    ),
    fault(
        "layers-sorted-as-text",
        "norm_1",
        "layers are taken in the order of their names as text: 0, 1, 10, 11, 2",
        _between_layers(_as_text),
        exposure="layers-12",
        first_layer=2,
    ),
    fault(
        "layers-by-one-digit",
        "norm_1",
        "names are told apart by one digit: layers 1 and 10 change places",
        _between_layers(_one_digit),
        exposure="layers-12",
        first_layer=1,
    ),
    fault(
        "out-proj-columns-by-channel",
        "attn.out_proj",
        "the input features of out_proj are read as [channel][head]",
        changed(_columns_by_channel, "attn.out_proj.weight"),
    ),
    fault(
        "one-row-lost",
        "ffn.up_proj",
        "one row of up_proj stays zero",
        changed(_zero(lambda n: slice(n // 3, n // 3 + 1)), "ffn.up_proj.weight"),
    ),
    fault(
        "one-column-lost",
        "ffn.down_proj",
        "one input feature of down_proj stays zero",
        changed(_without_column, "ffn.down_proj.weight"),
    ),
    fault(
        "last-shard-zero",
        "ffn.down_proj",
        "the last shard of four of down_proj is never copied",
        changed(_zero(lambda n: slice(n - n // 4, n)), "ffn.down_proj.weight"),
    ),
    fault(
        "matrix-sign",
        "attn.out_proj",
        "out_proj has the wrong sign",
        changed(lambda a, c: -a, "attn.out_proj.weight"),
    ),
    fault(
        "float16-bits",
        "attn.out_proj",
        "the bits of a bfloat16 matrix are read as float16",
        changed(_as_other_bits, "attn.out_proj.weight"),
        _DTYPE,
    ),
    fault(
        "matrix-truncated",
        "attn.Wqkv",
        "matrices are truncated to six significant bits",
        changed(_truncated, *_MATRICES),
    ),
    fault(
        "matrix-8-bit",
        "attn.Wqkv",
        "matrices are quantised to 8 bits a row",
        changed(_as_int8, *_MATRICES),
    ),
    fault(
        "biases-of-norms-swapped",
        "norm_1",
        "the biases of norm_1 and norm_2 change places",
        _exchanged("norm_1.bias", "norm_2.bias"),
        exposure="biases",
    ),
    fault(
        "up-proj-bias-lost",
        "ffn.up_proj",
        "the bias of up_proj stays zero",
        changed(_absent, "ffn.up_proj.bias"),
        exposure="biases",
    ),
    fault(
        "norm-f-bias-lost",
        "transformer.norm_f",
        "the bias of the final norm stays zero",
        changed(_absent, "transformer.norm_f.bias"),
        exposure="biases",
    ),
    fault(
        "k-ln-bias-lost",
        "attn.k_ln",
        "the bias of the keys' norm stays zero",
        changed(_absent, "attn.k_ln.bias"),
        exposure="grouped-query-qk-ln",
    ),
    fault(
        "q-ln-gamma-of-head-zero",
        "attn.q_ln",
        "every head is given the gains of head 0",
        changed(_first_head, "attn.q_ln.weight"),
        exposure="qk-ln",
    ),
    fault(
        "rmsnorm-gamma-plus-one",
        "norm_1",
        "the gains of RMS norms are stored as gamma + 1, as Gemma's are",
        changed(lambda a, c: a.astype(np.float32) + 1, *_GAINS),
        exposure="rmsnorm",
    ),
    fault(
        "lm-head-rows-shifted",
        "logits",
        "the rows of an untied head are shifted by one",
        changed(lambda a, c: np.roll(a, 1, axis=0), "lm_head.weight"),
        exposure="untied",
    ),
    fault(
        "q-ln-k-ln-swapped",
        "attn.q_ln",
        "q_ln and k_ln change places",
        _exchanged("attn.q_ln.weight", "attn.k_ln.weight"),
        "https://github.com/ggml-org/ggml/pull/499",
        "qk-ln",
    ),
)
