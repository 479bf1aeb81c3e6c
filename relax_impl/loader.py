"""From checkpoint tensors to parameters of the compiled model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from relax_impl.config import MPTConfig
from relax_impl.layout import ROWS, Layout
from relax_impl.model import MPTForCausalLM
from relax_impl.topology import topology

Array = NDArray[Any]
FLOATS = ("float16", "bfloat16", "float32", "float64")


class TensorEntry(Protocol):
    """One entry of one file of a checkpoint."""

    @property
    def name(self) -> str:
        """Original tensor name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""

    @property
    def dtype(self) -> str:
        """Dtype in the file, such as ``bfloat16``."""

    @property
    def file(self) -> Any:
        """The file that holds it."""


class CheckpointReader(Protocol):
    """What the loader needs of a checkpoint."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Every entry of every file, duplicates included; each a `TensorEntry`."""

    def read(self, name: str) -> Array:
        """Content of one tensor."""


class WeightMapError(ValueError):
    """Checkpoint and parameters are not in bijection.

    Each attribute is a tuple of ``tensor name: details``.
    """

    def __init__(
        self,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[str] = (),
        mistyped: Iterable[str] = (),
        duplicated: Iterable[str] = (),
        unmapped: Iterable[str] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)
        self.mistyped = tuple(mistyped)
        self.duplicated = tuple(duplicated)
        self.unmapped = tuple(unmapped)
        kinds = ("missing", "unexpected", "misshapen", "mistyped", "duplicated", "unmapped")
        found = [
            f"{kind}: {', '.join(getattr(self, kind))}" for kind in kinds if getattr(self, kind)
        ]
        super().__init__("the checkpoint does not fit the model; " + "; ".join(found))


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Where every Relax parameter comes from.

    Parameters
    ----------
    param_map
        Relax parameter name to the names of the checkpoint tensors it is made of.
    map_func
        Relax parameter name to the function of these tensors, in that order.
    layout
        The storage order that `map_func` produces.
    """

    param_map: Mapping[str, tuple[str, ...]]
    map_func: Mapping[str, Callable[..., Array]]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Relax parameters by name, and what they were made for."""

    config: MPTConfig
    dtype: str
    layout: Layout
    tensors: Mapping[str, Array]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Numpy's dtype of a name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def parameter_shapes(config: MPTConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and stored shape of every Relax parameter."""
    model = MPTForCausalLM(config, layout, "float32")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def mapping(config: MPTConfig, layout: Layout = ROWS) -> WeightMap:
    """Map every parameter from the tensor of the same name, matrices into `layout`."""

    def vector(tensor: Array) -> Array:
        return tensor

    shapes = topology(config)
    return WeightMap(
        param_map={name: (name,) for name in shapes},
        map_func={
            name: layout.store if len(shape) == 2 else vector for name, shape in shapes.items()
        },
        layout=layout,
    )


def check(config: MPTConfig, checkpoint: CheckpointReader, weight_map: WeightMap) -> None:
    """Check that every tensor of the topology is there once and is used once.

    Raises
    ------
    WeightMapError
        Names everything that is wrong.
    """
    expected = topology(config)
    entries: dict[str, list[Any]] = {}
    for entry in checkpoint.tensors:
        entries.setdefault(entry.name, []).append(entry)
    found = Counter(e.dtype for e in checkpoint.tensors if e.name in expected and e.dtype in FLOATS)
    majority = found.most_common(1)[0][0] if found else None
    used = Counter(name for names in weight_map.param_map.values() for name in names)
    parameters = parameter_shapes(config, weight_map.layout)

    missing = [
        f"{name}: expected {shape}" for name, shape in expected.items() if name not in entries
    ]
    unexpected = [f"{name}: in {e[0].file}" for name, e in entries.items() if name not in expected]
    duplicated = [
        f"{name}: in " + " and ".join(str(e.file) for e in several)
        for name, several in entries.items()
        if len(several) > 1
    ]
    misshapen, mistyped = [], []
    for name, shape in expected.items():
        for entry in entries.get(name, ()):
            if tuple(entry.shape) != shape:
                misshapen.append(f"{name}: expected {shape}, found {tuple(entry.shape)}")
            if entry.dtype != majority:
                wanted = f"{majority} as most tensors" if majority else "a floating-point dtype"
                mistyped.append(f"{name}: expected {wanted}, found {entry.dtype}")
    unmapped = [
        f"{name}: expected in one parameter, found in {used[name]}"
        for name in expected
        if used[name] != 1
    ]
    unmapped += [f"{name}: not a tensor of this model" for name in used if name not in expected]
    unmapped += [
        f"{name}: no such parameter" for name in weight_map.param_map if name not in parameters
    ]
    unmapped += [
        f"{name}: parameter without a source"
        for name in parameters
        if name not in weight_map.param_map
    ]
    if missing or unexpected or misshapen or mistyped or duplicated or unmapped:
        raise WeightMapError(
            missing=missing,
            unexpected=unexpected,
            misshapen=misshapen,
            mistyped=mistyped,
            duplicated=duplicated,
            unmapped=unmapped,
        )


def load_parameters(
    config: MPTConfig,
    checkpoint: CheckpointReader,
    dtype: str,
    weight_map: WeightMap | None = None,
) -> Parameters:
    """Read every tensor once and convert it to the storage dtype.

    Parameters
    ----------
    config
        The model.
    checkpoint
        Where the tensors come from.
    dtype
        Storage dtype of the parameters; values are rounded to nearest.
    weight_map
        Made by `mapping` for the layout of the library; rows by default.

    Returns
    -------
    loaded
        `Parameters`, ready for `runtime.Model`.

    Raises
    ------
    WeightMapError
        Tensors are missing, unexpected, misshapen, mistyped or duplicated, or the map does not
        use each exactly once.
    """
    weight_map = weight_map or mapping(config)
    check(config, checkpoint, weight_map)
    shapes = parameter_shapes(config, weight_map.layout)
    tensors: dict[str, Array] = {}
    misshapen = []
    for name in weight_map.param_map:
        tensor = apply(weight_map, name, checkpoint.read, dtype)
        if tensor.shape != shapes[name]:
            misshapen.append(f"{name}: expected {shapes[name]}, mapped to {tensor.shape}")
        tensors[name] = tensor
    if misshapen:
        raise WeightMapError(misshapen=misshapen)
    return Parameters(config, dtype, weight_map.layout, tensors)


def lazy_parameters(
    config: MPTConfig,
    checkpoint: CheckpointReader,
    dtype: str,
    weight_map: WeightMap | None = None,
) -> Parameters:
    """Return parameters of which each is read and converted whenever it is asked for, and not kept.

    Parameters and errors as `load_parameters`; a shape that does not fit is raised when the tensor
    is asked for.
    """
    weight_map = weight_map or mapping(config)
    check(config, checkpoint, weight_map)
    return Parameters(
        config, dtype, weight_map.layout, _Lazy(config, checkpoint, dtype, weight_map)
    )


class _Lazy(Mapping[str, Array]):
    def __init__(
        self, config: MPTConfig, checkpoint: CheckpointReader, dtype: str, weight_map: WeightMap
    ) -> None:
        self._read, self._dtype, self._map = checkpoint.read, dtype, weight_map
        self._shapes = parameter_shapes(config, weight_map.layout)

    def __getitem__(self, name: str) -> Array:
        tensor = apply(self._map, name, self._read, self._dtype)
        if tensor.shape != self._shapes[name]:
            found = f"{name}: expected {self._shapes[name]}, mapped to {tensor.shape}"
            raise WeightMapError(misshapen=[found])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._map.param_map)

    def __len__(self) -> int:
        return len(self._map.param_map)


def apply(weight_map: WeightMap, name: str, read: Callable[[str], Array], dtype: str) -> Array:
    """Make one parameter from the tensors that `read` returns."""
    arrays = [read(source) for source in weight_map.param_map[name]]
    return convert(weight_map.map_func[name](*arrays), dtype)


def convert(array: Array, dtype: str) -> Array:
    """Convert to a storage dtype; an overflow becomes infinity without a warning."""
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(numpy_dtype(dtype), copy=False)
