"""The IRModule: every function of the library, with the parameters it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from relax_impl.attention import Attention
from relax_impl.cached import PANEL, Past, WithPast, key_shape
from relax_impl.config import MPTConfig
from relax_impl.layout import Layout
from relax_impl.model import MPTBlock, MPTEmbedding, MPTForCausalLM
from relax_impl.operations import Operations
from relax_impl.operations import last as pick_last
from relax_impl.topology import block_topology, embedding_topology, head_topology

LayerOperations = Callable[[int], Operations]
"""Layer to operations; -1 is the embedding and n_layers the head."""

DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of the library.

    `parameters` are the names of the tensors that follow the inputs; `outputs` the taps of the
    tuple it returns, in order, or empty where it returns one tensor. The parameters of a block are
    relative to the block.
    """

    name: str
    parameters: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Graph:
    """A module that is not yet compiled.

    `variants` gives, per layer, the variant of `block` and `attend` that computes it: variant 0 is
    called ``block``, variant 1 ``block_1``, and so on, one per distinct `Operations`.
    """

    module: tvm.IRModule
    functions: Mapping[str, Function]
    variants: tuple[int, ...]
    layout: Layout


def variant_name(function: str, variant: int) -> str:
    """Name of a variant of `block` or `attend`."""
    return f"{function}_{variant}" if variant else function


class _Taps:
    """Keeps what passes; the last value of a name counts."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.values[name] = value
        return value


class _Builder:
    def __init__(self) -> None:
        self.builder = relax.BlockBuilder()
        self.functions: dict[str, Function] = {}

    def add(
        self,
        name: str,
        inputs: Mapping[str, tuple[tuple[Any, ...], str]],
        parameters: Iterable[tuple[str, nn.Parameter]],
        emit: Callable[..., Tensor | _Taps],
    ) -> None:
        """Add a function that `emit` writes, given its inputs as tensors.

        A size is a number, the name of a symbolic one, or a name and the number it is multiplied
        by.
        """
        sizes: dict[str, tirx.Var] = {}

        def dimension(size: int | str | tuple[str, int]) -> Any:
            if isinstance(size, tuple):
                return dimension(size[0]) * size[1]
            return (
                sizes.setdefault(size, tirx.Var(size, "int64")) if isinstance(size, str) else size
            )

        def tensor(name: str, shape: Iterable[Any], dtype: str) -> Tensor:
            return Tensor.placeholder([dimension(size) for size in shape], dtype, name)

        arguments = [tensor(key, shape, dtype) for key, (shape, dtype) in inputs.items()]
        variables = [argument._expr for argument in arguments]
        names = []
        for key, parameter in parameters:
            # As nn's own exporter binds a parameter to a variable of the function at hand.
            parameter._expr = tensor(key, parameter.shape, parameter.dtype)._expr
            variables.append(parameter._expr)
            names.append(key)
        with self.builder.function(name, variables, attrs={"num_input": len(arguments)}):
            with self.builder.dataflow():
                result = emit(*arguments)
                if isinstance(result, _Taps):
                    outputs = tuple(result.values)
                    value: Any = relax.Tuple([tap._expr for tap in result.values.values()])
                else:
                    outputs, value = (), result._expr
                value = self.builder.emit_output(value)
            self.builder.emit_func_output(value)
        self.functions[name] = Function(name, tuple(names), outputs)


def _variants(config: MPTConfig, operations: LayerOperations) -> tuple[list[Operations], list[int]]:
    distinct: list[Operations] = []
    table = []
    for layer in range(config.n_layers):
        ops = operations(layer)
        if ops not in distinct:
            distinct.append(ops)
        table.append(distinct.index(ops))
    return distinct, table


def _one_layout(config: MPTConfig, operations: LayerOperations) -> Layout:
    layouts = {operations(layer).layout for layer in range(-1, config.n_layers + 1)}
    if len(layouts) != 1:
        names = ", ".join(sorted(layout.name for layout in layouts))
        raise ValueError(f"operations: expected one layout for all layers, found {names}")
    return layouts.pop()


def _after_a_past(ops: Operations, past: Past) -> Operations:
    """Return building blocks that see the past; all the rest is what runs without one."""
    # A fault may put a bare function where the attention is; it has no pieces to share.
    plain = ops.attention if isinstance(ops.attention, Attention) else Attention()

    def positions(ids: Tensor, table: MPTEmbedding) -> Tensor:
        return ops.positions_after(ids, table, past.lengths, past.starts)

    attention = WithPast(ops.cached, plain, past)
    return dataclasses.replace(ops, attention=attention, positions=positions)


def build_graph(
    config: MPTConfig, dtype: str, operations: LayerOperations, *, whole: bool = True
) -> Graph:
    """Write the functions embed, block, attend, head, forward, extend and last.

    `extend` is forward with a past: new ids (b, s), the number of slots each sequence holds and of
    those that are padding, and for every layer keys and values, which it changes in place. It
    returns the stream of the new positions. Batch, length and capacity are symbolic: a prefill is
    the call whose past is empty, a decode step the one with s = 1. `last` picks a position of every
    sequence, so that the head need not run on all of them.

    Parameters
    ----------
    config
        The model.
    dtype
        Storage dtype of weights and hidden states, one of `DTYPES`.
    operations
        Building blocks, per layer.
    whole
        False leaves out what takes the weights of every layer at once, forward, extend and last,
        and writes layer: a block without taps, of which forward is a chain.

    Returns
    -------
    Graph
        The module, before any target is chosen.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    layout = _one_layout(config, operations)
    distinct, table = _variants(config, operations)
    model = MPTForCausalLM(config, layout, dtype)
    block = MPTBlock(config, layout, dtype)
    named = dict(model.named_parameters())
    first, last = operations(-1), operations(config.n_layers)
    ids = {"ids": (("b", "s"), "int32")}
    hidden = {"hidden": (("b", "s", config.d_model), dtype)}
    build = _Builder()

    def embed(ids: Tensor) -> _Taps:
        taps = _Taps()
        model.embed(first, ids, taps)
        return taps

    def head(hidden: Tensor) -> _Taps:
        taps = _Taps()
        model.head(last, hidden, taps)
        return taps

    def forward(ids: Tensor) -> Tensor:
        stream = model.embed(first, ids)
        for layer, one in enumerate(model.transformer.blocks):
            stream = one.forward(operations(layer), stream)
        return model.head(last, stream)

    def extend(ids: Tensor, lengths: Tensor, starts: Tensor, *caches: Tensor) -> Tensor:
        pasts = [Past(lengths, starts, *pair) for pair in zip(*[iter(caches)] * 2, strict=True)]
        stream = model.embed(_after_a_past(first, pasts[0]), ids)
        for layer, one in enumerate(model.transformer.blocks):
            stream = one.forward(_after_a_past(operations(layer), pasts[layer]), stream)
        return stream

    head_names = list(head_topology(config))
    if config.tie_word_embeddings:
        head_names.append("transformer.wte.weight")
    build.add("embed", ids, [(name, named[name]) for name in embedding_topology(config)], embed)
    build.add("head", hidden, [(name, named[name]) for name in head_names], head)
    block_names, block_named = list(block_topology(config)), dict(block.named_parameters())
    for variant, ops in enumerate(distinct):

        def one_block(hidden: Tensor, ops: Operations = ops) -> _Taps:
            taps = _Taps()
            block.forward(ops, hidden, taps)
            return taps

        def attend(q: Tensor, k: Tensor, v: Tensor, ops: Operations = ops) -> Tensor:
            slopes = Tensor.from_const(ops.slopes(config))
            return ops.attention(q, k, v, slopes, config)

        heads, kv_heads, dim = config.n_heads, config.kv_n_heads, config.head_dim
        queries = {"q": (("b", "sq", heads, dim), dtype)}
        keys = {name: (("b", "sk", kv_heads, dim), dtype) for name in ("k", "v")}
        name = variant_name("block", variant)
        build.add(name, hidden, [(name, block_named[name]) for name in block_names], one_block)
        build.add(variant_name("attend", variant), queries | keys, [], attend)
        if not whole:

            def one_layer(hidden: Tensor, ops: Operations = ops) -> Tensor:
                return block.forward(ops, hidden)

            parameters = [(key, block_named[key]) for key in block_names]
            build.add(variant_name("layer", variant), hidden, parameters, one_layer)
    if not whole:
        return Graph(build.builder.finalize(), build.functions, tuple(table), layout)
    build.add("forward", ids, list(named.items()), forward)
    caches: dict[str, tuple[tuple[Any, ...], str]] = {}
    for layer in range(config.n_layers):
        held = (key_shape(config, "b", "p"), dtype)
        caches |= {f"keys_{layer}": held}
        caches |= {f"values_{layer}": (("b", config.kv_n_heads, ("p", PANEL), dim), dtype)}
    sequences = {name: (("b",), "int32") for name in ("lengths", "starts")}
    # The stream after the last block needs neither the final norm nor the head.
    needed = [*embedding_topology(config)] + [
        n for n in named if n.startswith("transformer.blocks.")
    ]
    build.add("extend", ids | sequences | caches, [(n, named[n]) for n in needed], extend)
    build.add("last", hidden | {"index": (("b",), "int32")}, [], pick_last)
    module = build.builder.finalize()
    return Graph(module, build.functions, tuple(table), layout)
