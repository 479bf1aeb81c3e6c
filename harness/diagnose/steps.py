"""One sub-module of the port at a time, healthy and with every candidate fault.

A function takes the values of other taps and computes one: every sub-module reads the taps it is
given and never what another sub-module made of them. A fault changes the functions of the taps it
acts on and no other; what stays equal as a graph is not compiled and not run.

The functions are made of the port's own building blocks, so that the same mutation that plants a
fault makes its template. They compute in float32, where the rounding of the storage dtype does not
blur the difference between faulty and healthy; float64 is no dtype of the port. Faults of precision
are computed in the storage dtype too: they may leave out a widening that float32 does not need, or
round twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np

from harness.measure.taps import block_widths, embed_widths, head_widths
from harness.measure.widening import converted
from harness.subjects.protocol import Array

PartName = Literal["embed", "block", "head", "attend"]
HEALTHY = ""
"""The key of the port without a fault."""


@dataclass(frozen=True)
class Variant:
    """A port that computes differently: its building blocks and its config."""

    key: str
    operations: Any
    config: Any


@dataclass(frozen=True)
class Steps:
    """Functions that compute one tap.

    Attributes
    ----------
    machine
        Compiles what runs them, or finds it compiled, when it is first asked for.
    dtype
        In which they compute.
    function
        Variant to the function that computes it; variants equal to the healthy one share its.
    arguments
        Function to the names of what it reads, in order: taps and parameters.
    sizes
        Function to the shapes of all that it is given, ``None`` for a size of any value.
    """

    machine: Callable[[], Any]
    dtype: str
    function: Mapping[str, str]
    arguments: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Mapping[str, tuple[int | None, ...]]]

    def differs(self, key: str) -> bool:
        """Return whether a variant computes this tap at all, and by another graph."""
        return key in self.function and self.function[key] != self.function[HEALTHY]

    def reads(self) -> tuple[str, ...]:
        """Return what the healthy function reads."""
        return self.arguments[self.function[HEALTHY]]

    def takes(self, key: str, values: Mapping[str, Array]) -> bool:
        """Return whether the values have the shapes that a variant reads.

        One that takes the config for another may want weights of other sizes than there are.
        """
        name = self.function[key]
        return all(
            len(values[argument].shape) == len(self.sizes[name][argument])
            and all(
                size in (None, found)
                for size, found in zip(
                    self.sizes[name][argument], values[argument].shape, strict=True
                )
            )
            for argument in self.arguments[name]
        )

    def run(self, key: str, values: Mapping[str, Array]) -> Array:
        """Return the tap as a variant computes it.

        Parameters
        ----------
        values
            Taps ``(batch, seq, features)`` with ``input`` for the stream, or ``ids``, or queries,
            keys and values; and weights by their names relative to the part. Any float dtype.
        """
        import tvm

        from harness.checkpoint.dtypes import BY_NAME

        name = self.function[key]
        arguments = []
        for argument in self.arguments[name]:
            given = np.asarray(values[argument])
            if argument == "ids":
                array = np.ascontiguousarray(given.astype(np.int32))
            else:
                array = converted(np.ascontiguousarray(given), BY_NAME[self.dtype].numpy)
            arguments.append(tvm.runtime.tensor(array))
        return np.asarray(self.machine()[name](*arguments).numpy())


class _Writer:
    """Writes the functions of one tap, one for each variant that has a graph of its own."""

    def __init__(self, part: PartName, tap: str, dtype: str) -> None:
        from tvm import relax

        self.part, self.tap, self.dtype = part, tap, dtype
        self.builder = relax.BlockBuilder()
        self.names: dict[str, tuple[str, ...]] = {}
        self.sizes: dict[str, dict[str, tuple[int | None, ...]]] = {}

    def add(self, name: str, variant: Variant) -> bool:
        """Add a function; return whether the variant has this tap.

        What fails to be written, such as a fault of a layer that the config does not have, is not a
        variant of this model.
        """
        try:
            self._write(name, variant)
        except Exception:
            # A mutation may do anything with what it does not find.
            return False
        return True

    def _write(self, name: str, variant: Variant) -> None:
        from tvm import tirx
        from tvm.relax.frontend.nn import Tensor

        sizes: dict[str, Any] = {}

        def tensor(key: str, shape: Sequence[int | str], dtype: str = self.dtype) -> Any:
            dimensions = [
                sizes.setdefault(n, tirx.Var(n, "int64")) if isinstance(n, str) else n
                for n in shape
            ]
            return Tensor.placeholder(dimensions, dtype, key.replace(".", "_"))

        builder = self.builder
        inputs, parameters, emit = _arguments(self.part, variant, self.dtype, tensor)
        for key, parameter in parameters.items():
            parameter._expr = tensor(key, parameter.shape)._expr
        variables = [i._expr for i in inputs.values()] + [p._expr for p in parameters.values()]
        with builder.function(name, variables):
            try:
                with builder.dataflow():
                    value = builder.emit_output(emit(inputs, self.tap)._expr)
            except Exception:
                # Else the next function would be written inside of this one.
                builder._end_block()
                builder.end_scope()
                raise
            builder.emit_func_output(value)
        self.names[name] = (*inputs, *parameters)
        self.sizes[name] = {
            key: tuple(int(n) if isinstance(n, (int, tirx.IntImm)) else None for n in given.shape)
            for key, given in {**inputs, **parameters}.items()
        }


def _arguments(part: PartName, variant: Variant, dtype: str, tensor: Any) -> tuple[Any, Any, Any]:
    """Return the inputs and parameters of a part, and what writes one of its taps."""
    from relax_impl.layout import ROWS
    from relax_impl.model import MPTBlock, MPTForCausalLM
    from relax_impl.topology import block_topology, embedding_topology, head_topology

    config, operations = variant.config, variant.operations
    stream = {"input": tensor("input", ("b", "s", config.d_model))}

    def given(widths: Mapping[str, int]) -> dict[str, Any]:
        return {tap: tensor(tap, ("b", "s", width)) for tap, width in widths.items()}

    def tapped(write: Any) -> Any:
        def emit(inputs: Mapping[str, Any], wanted: str) -> Any:
            seen: dict[str, Any] = {}

            def tap(name: str, value: Any) -> Any:
                seen[name] = value
                return inputs.get(name, value)

            write(inputs, tap)
            return seen[wanted]

        return emit

    if part == "attend":
        heads, kv_heads, dim = config.n_heads, config.kv_n_heads, config.head_dim
        inputs = {"q": tensor("q", ("b", "sq", heads, dim))}
        inputs |= {key: tensor(key, ("b", "sk", kv_heads, dim)) for key in ("k", "v")}

        def attend(inputs: Mapping[str, Any], wanted: str) -> Any:
            from tvm.relax.frontend.nn import Tensor

            slopes = Tensor.from_const(operations.slopes(config))
            return operations.attention(inputs["q"], inputs["k"], inputs["v"], slopes, config)

        return inputs, {}, attend
    if part == "block":
        block = MPTBlock(config, ROWS, dtype)
        named = dict(block.named_parameters())
        return (
            stream | given(block_widths(config)),
            {name: named[name] for name in block_topology(config)},
            tapped(lambda i, tap: block.forward(operations, i["input"], tap)),
        )
    model = MPTForCausalLM(config, ROWS, dtype)
    named = dict(model.named_parameters())
    if part == "embed":
        return (
            {"ids": tensor("ids", ("b", "s"), "int32")} | given(embed_widths(config)),
            {name: named[name] for name in embedding_topology(config)},
            tapped(lambda i, tap: model.embed(operations, i["ids"], tap)),
        )
    names = list(head_topology(config))
    names += ["transformer.wte.weight"] * config.tie_word_embeddings
    return (
        stream | given(head_widths(config)),
        {name: named[name] for name in names},
        tapped(lambda i, tap: model.head(operations, i["input"], tap)),
    )


def write_steps(
    part: PartName, tap: str, variants: Sequence[Variant], dtype: str = "float32"
) -> Steps:
    """Write the functions of one tap.

    Parameters
    ----------
    part, tap
        What is computed; ``attend`` has the one tap ``alibi``.
    variants
        The healthy port first, under the key ``HEALTHY``.
    dtype
        In which they compute.
    """
    import tvm
    from tvm import relax
    from tvm_ffi import StructuralKey

    from relax_impl.target import resolve

    writer = _Writer(part, tap, dtype)
    names = {}
    for index, variant in enumerate(variants):
        if writer.add(f"step_{index}", variant):
            names[variant.key] = f"step_{index}"
    module = writer.builder.finalize()
    module = relax.transform.DeadCodeElimination(list(names.values()))(module)
    first: dict[Any, str] = {}
    function = {}
    for key, name in names.items():
        plain = module[name].without_attr("global_symbol")
        function[key] = first.setdefault(StructuralKey(plain), name)
    kept = set(function.values())
    module = tvm.IRModule(
        {
            variable: body
            for variable, body in module.functions_items()
            if not isinstance(body, relax.Function) or variable.name_hint in kept
        }
    )
    module = relax.transform.DeadCodeElimination(sorted(kept))(module)
    arguments = {}
    for name in sorted(kept):
        module[name], arguments[name] = _pruned(module[name], writer.names[name])
    machine = cache(lambda: _machine(module, resolve("llvm")))
    return Steps(machine, dtype, function, arguments, writer.sizes)


def _pruned(function: Any, names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Return a function without the parameters that it does not read, and the names of the rest."""
    from tvm import relax

    read = set(relax.analysis.free_vars(function.body))
    kept = [(p, n) for p, n in zip(function.params, names, strict=True) if p in read]
    body = relax.Function(
        [parameter for parameter, _ in kept],
        function.body,
        function.ret_ty,
        function.is_pure,
        function.attrs,
    )
    return body, tuple(name for _, name in kept)


def _machine(module: Any, target: Any) -> Any:
    import tvm
    from tvm import relax

    from relax_impl import sealed
    from relax_impl.compile import OBJECTS, cache_directory, cache_key
    from relax_impl.objects import link

    path = cache_directory() / "diagnosis" / f"{cache_key(module, target)}.so"
    if not sealed.intact(path):
        passes = relax.pipeline.get_default_pipeline(target)
        link(module, target, passes, path, cache_directory() / OBJECTS)
    return relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())


@lru_cache(maxsize=64)
def library_steps(
    part: PartName,
    tap: str,
    config: Any,
    dtype: str,
    *,
    area: str | None = None,
    only: frozenset[str] | None = None,
) -> Steps:
    """Return the functions of one tap for the faults of the library on one config.

    Parameters
    ----------
    config
        Parsed by the port's room.
    dtype
        In which they compute.
    area
        Leave out the faults of all other areas.
    only
        Leave out the faults of all other names.
    """
    from harness.faults.library import library
    from relax_impl.operations import PLAIN

    variants = [Variant(HEALTHY, PLAIN, config)]
    for fault in library().values():
        if fault.equivalent:
            continue
        if fault.operations is None and fault.config is None:
            continue
        if area not in (None, fault.area) or (only is not None and fault.name not in only):
            continue
        try:
            changed = fault.config(config) if fault.config else config
            operations = fault.operations(PLAIN) if fault.operations else PLAIN
        except Exception:
            # A fault of a field that this config leaves out has nothing to take hold of.
            continue
        variants.append(Variant(fault.name, operations, changed))
    return write_steps(part, tap, variants, dtype)
