"""A PyTorch state dict's pickle, interpreted without ever being executed.

A pickle is a program. This module walks its opcodes with `pickletools` and evaluates the few that
a state dict of tensors needs on a stack of inert records; a global is a pair of strings that is
compared with a list, never imported, so no pickle can call anything. What is not on the list is
refused by name.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.dtypes import BY_NAME, BY_STORAGE, ElementType


class UnsafePickle(ValueError):
    """The pickle holds or does something that weights do not need."""


@dataclass(frozen=True)
class Symbol:
    """A global that the pickle names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class StorageRef:
    """A typed run of `count` elements in the archive's record ``data/<key>``."""

    key: str
    kind: ElementType
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; `offset` and `strides` in elements of `kind`."""

    storage: StorageRef
    kind: ElementType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Pairs:
    """A dict with its items as they were set, repeated keys included."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


_MARK = object()
_NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"})
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"})
_PUSH_ARGUMENT = _NUMBERS | _TEXTS
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME"})


def interpret(data: bytes) -> Any:
    """Evaluate the pickle in `data` to inert records.

    Returns
    -------
    object
        Whatever the pickle holds, with `Pairs` for dicts, `TensorRef` for tensors and `Symbol`
        for globals.

    Raises
    ------
    UnsafePickle
        An opcode, global or call that a state dict does not need, or a malformed pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                if len(stack) != 1:
                    break
                return stack[0]
            _step(opcode.name, argument, stack, memo)
    except UnsafePickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UnsafePickle(f"malformed pickle ({type(error).__name__}: {error})") from error
    raise UnsafePickle("malformed pickle (it ends without a single result)")


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise UnsafePickle("malformed pickle (no mark)")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _PUSH_ARGUMENT:
        stack.append(argument)
    elif name in _PUSH_CONSTANT:
        stack.append(_PUSH_CONSTANT[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_DICT":
        stack.append(Pairs())
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name in _TUPLES:
        items = tuple(stack[-_TUPLES[name] :])
        del stack[-_TUPLES[name] :]
        stack.append(items)
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name in ("APPEND", "APPENDS"):
        items_ = [stack.pop()] if name == "APPEND" else _since_mark(stack)
        _expect(stack[-1], list, "appends to").extend(items_)
    elif name in ("SETITEM", "SETITEMS"):
        flat = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _since_mark(stack)
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        _expect(stack[-1], Pairs, "sets items of").items.extend(pairs)
    elif name == "GLOBAL":
        module, _, attribute = argument.partition(" ")
        stack.append(_symbol(module, attribute))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_symbol(module, attribute))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, _expect(arguments, tuple, "calls with")))
    elif name == "BUILD":
        # torch.nn.Module.state_dict hangs a `_metadata` attribute on the dict; nothing reads it.
        stack.pop()
        _expect(stack[-1], Pairs, "sets attributes of")
    elif name not in _IGNORED:
        raise UnsafePickle(f"the pickle uses the opcode {name}, which weights do not need")


def _expect(value: Any, kind: type, verb: str) -> Any:
    if not isinstance(value, kind):
        raise UnsafePickle(f"the pickle {verb} {describe(value)}, which weights do not need")
    return value


def describe(value: Any) -> str:
    """Name a record the way a user knows it."""
    if isinstance(value, Symbol):
        return f"the global {value}"
    names = {Pairs: "a dict", TensorRef: "a tensor", StorageRef: "a bare storage"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


_CALLABLE = frozenset(
    {
        Symbol("collections", "OrderedDict"),
        Symbol("torch", "Size"),
        Symbol("torch._utils", "_rebuild_tensor"),
        Symbol("torch._utils", "_rebuild_tensor_v2"),
        Symbol("torch._utils", "_rebuild_tensor_v3"),
        Symbol("torch._utils", "_rebuild_parameter"),
    }
)


def _symbol(module: Any, name: Any) -> Symbol:
    symbol = Symbol(str(module), str(name))
    is_type = symbol.module in ("torch", "torch.storage") and (
        symbol.name in BY_STORAGE or symbol.name in BY_NAME or symbol.name == "UntypedStorage"
    )
    if symbol not in _CALLABLE and not is_type:
        raise UnsafePickle(f"the pickle refers to {symbol}, which weights do not need")
    return symbol


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise UnsafePickle(f"malformed tensor ({value!r} where a natural number belongs)")
    return value


def _storage(pid: Any) -> StorageRef:
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
        raise UnsafePickle("the pickle refers to something outside it that is not a storage")
    _, kind, key, _, count = pid
    if not isinstance(kind, Symbol) or not isinstance(key, str):
        raise UnsafePickle("malformed storage")
    element = BY_NAME["uint8"] if kind.name == "UntypedStorage" else BY_STORAGE[kind.name]
    return StorageRef(key, element, _natural(count))


def _call(function: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(function, Symbol) or function not in _CALLABLE:
        raise UnsafePickle(f"the pickle calls {describe(function)}, which weights do not need")
    if function.name == "OrderedDict":
        listed = args[0] if args else []
        return Pairs([(key, value) for key, value in _expect(listed, list, "makes a dict of")])
    if function.name == "Size":
        return tuple(_natural(n) for n in args[0])
    if function.name == "_rebuild_parameter":
        return _expect(args[0], TensorRef, "makes a parameter of")
    return _tensor(function.name, args)


def _tensor(rebuild: str, args: tuple[Any, ...]) -> TensorRef:
    storage, offset, shape, strides = args[:4]
    _expect(storage, StorageRef, "makes a tensor of")
    kind, metadata = storage.kind, args[6:7]
    if rebuild == "_rebuild_tensor_v3":
        kind, metadata = BY_NAME[_expect(args[6], Symbol, "takes as dtype").name], args[7:8]
    if any(isinstance(m, Pairs) and any(on for _, on in m.items) for m in metadata):
        # A lazily conjugated or negated tensor: its bytes are not its values.
        raise UnsafePickle("a tensor is stored lazily conjugated or negated")
    if len(shape) != len(strides):
        raise UnsafePickle("malformed tensor (as many strides as axes expected)")
    return TensorRef(
        storage,
        kind,
        _natural(offset),
        tuple(_natural(n) for n in shape),
        tuple(_natural(n) for n in strides),
    )
