"""Small models, and every step of MPT in float64 with a bound on its error.

A `Bounded` is a float64 value and how far a float32 computation of it, rounded once to the
storage dtype, can be off. The bounds are running error analysis: `gamma(n)` = n u / (1 - n u) for n
roundings in a row, with u = 2^-24, times the sum of absolute values that passes through them.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from relax_impl.compile import compile_model
from relax_impl.config import MPTConfig
from relax_impl.loader import load_parameters, mapping
from relax_impl.operations import Operations
from relax_impl.runtime import Model
from relax_impl.topology import topology

U32 = 2.0**-24
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": U32}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# exp on [-ln2/2, ln2/2]: a multiply-add for each of 7 degrees, relative to a value that may be
# e^0.7 = 2 times smaller than the largest partial sum, and two roundings of the reduced argument.
EXP_ROUNDINGS = 2 * 7 + 2


def gamma(n: float) -> float:
    return n * U32 / (1 - n * U32)


@dataclasses.dataclass(frozen=True)
class Bounded:
    value: np.ndarray
    error: np.ndarray

    def stored(self, dtype: str) -> Bounded:
        rounding = UNIT[dtype] * (abs(self.value) + self.error) + SMALLEST[dtype] / 2
        return Bounded(self.value, self.error + rounding)

    def excess(self, found: np.ndarray) -> float:
        """Largest error in units of the bound: at most 1 for a correct implementation."""
        assert found.shape == self.value.shape
        assert np.isfinite(found.astype(np.float64)).all()
        return float((abs(found.astype(np.float64) - self.value) / self.error).max())


def linear(x: Any, weight: Any, bias: Any = None) -> Bounded:
    value, size = x @ weight.T, abs(x) @ abs(weight).T
    if bias is not None:
        value, size = value + bias, size + abs(bias)
    return Bounded(value, gamma(x.shape[-1] + 1) * size)


def norm(x: Any, weight: Any, bias: Any, epsilon: float, is_rms: bool) -> Bounded:
    n = x.shape[-1]
    mean = np.zeros_like(x[..., :1]) if is_rms else x.mean(-1, keepdims=True)
    d_mean = 0 if is_rms else gamma(n + 1) * abs(x).mean(-1, keepdims=True)
    c = x - mean
    d_c = d_mean + U32 * (abs(c) + d_mean)
    power = (c * c).mean(-1, keepdims=True)
    d_power = (2 * abs(c) * d_c + d_c**2).mean(-1, keepdims=True) + gamma(n + 3) * power
    # y^(-1/2) moves by at most half of the relative change of y; + epsilon, sqrt, reciprocal.
    relative = d_power / (power + epsilon - d_power) / 2 + gamma(4)
    scale = 1 / np.sqrt(power + epsilon)
    offset = 0 if bias is None else bias
    value = c * scale * weight + offset
    error = abs(weight) * scale * (d_c + abs(c) * relative) * (1 + relative)
    return Bounded(value, error + gamma(3) * (abs(c * scale * weight) + abs(offset)))


def gelu(x: Any) -> Bounded:
    erf = np.vectorize(math.erf)
    erfc = np.vectorize(math.erfc)
    value = np.where(x > 0, x * (1 + erf(x * 0.5**0.5)) / 2, x * erfc(-x * 0.5**0.5) / 2)
    # Relax: constant and product before erf (slope of erf(x) x at most 1), erf to 1 ulp, half, sum,
    # product. Kernel: |x|/2 times erfc, whose exponent is a polynomial of degree 11 with terms that
    # sum to 2 in size, minus t^2 (absolute error of an exponent = relative error); where erfc is
    # below u the exponent no longer matters.
    t2 = np.minimum(x * x / 2, -math.log(U32))
    kernel = np.expm1(gamma(2 * 11 * 2) + gamma(3) * t2 + gamma(EXP_ROUNDINGS + 4))
    tail = abs(x) / 2 * np.maximum(erfc(abs(x) * 0.5**0.5), U32)
    return Bounded(value, np.maximum(abs(x) * gamma(7), tail * kernel + gamma(3) * abs(value)))


def attend(config: MPTConfig, q: Any, k: Any, v: Any, slopes: Any) -> Bounded:
    sq, sk, group = q.shape[1], k.shape[1], config.n_heads // config.kv_n_heads
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    score = np.einsum("bihd,bjhd->bhij", q, k) * config.scale
    size = np.einsum("bihd,bjhd->bhij", abs(q), abs(k)) * abs(config.scale)
    key, query = np.arange(sk)[None, :], np.arange(sk - sq, sk)[:, None]
    bias = slopes[:, None, None] * (key - query)
    # Scaling q, the product, the scale itself; slope, its product, the sum.
    d_score = gamma(q.shape[-1] + 2) * size + gamma(3) * abs(bias) + U32 * (size + abs(bias))
    score = np.where(key <= query, score + bias, -np.inf)
    top = score.max(-1, keepdims=True)
    z = np.where(key <= query, score - top, 0.0)
    p = np.exp(score - top)
    p /= p.sum(-1, keepdims=True)
    d_score = np.where(key <= query, d_score, 0.0)
    # Each numerator: errors of its own score and of the subtraction, exp, and one rescaling by exp
    # per block of 128 keys. The maximum itself cancels.
    blocks = -(-sk // 128)
    relative = np.expm1(d_score + 2 * U32 * abs(z) + gamma(EXP_ROUNDINGS + 2) * (1 + blocks))
    shift = (p * relative).sum(-1, keepdims=True) + gamma(sk + 2)
    weight = p * (relative + shift) / (1 - shift) + np.exp(-87.0)
    value = np.einsum("bhij,bjhd->bihd", p, v)
    spread = np.einsum("bhij,bjhd->bihd", weight + gamma(sk + 3) * p, abs(v))
    return Bounded(value, spread)


def slopes(config: MPTConfig) -> Any:
    power = 2 ** math.ceil(math.log2(config.n_heads))
    m = [i * config.alibi_bias_max / power for i in range(1, power + 1)]
    every = [2.0**-e for e in m]
    if power != config.n_heads:
        every = (every[1::2] + every[0::2])[: config.n_heads]
    return np.array(every) if config.alibi else np.zeros(config.n_heads)


class Checkpoint:
    """Random tensors in which no gain is one, no offset zero and no two rows are alike."""

    def __init__(self, config: MPTConfig, dtype: str, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}
        for name, shape in topology(config).items():
            array = random.standard_normal(shape)
            if len(shape) == 2:
                array *= shape[1] ** -0.5 if "te" not in name else 0.5
            else:
                array = array * 0.3 + name.endswith("weight")
            self.arrays[name] = array.astype(NUMPY[dtype])
        self.tensors = tuple(
            types.SimpleNamespace(name=n, shape=a.shape, dtype=str(a.dtype), file="one.bin")
            for n, a in self.arrays.items()
        )

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


class Steps:
    """Each tap in float64 from the taps before it, as the implementation gave them."""

    def __init__(self, config: MPTConfig, checkpoint: Checkpoint, dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.weights = {n: a.astype(np.float64) for n, a in checkpoint.arrays.items()}

    def _norm(self, prefix: str, x: Any, is_rms: bool) -> Bounded:
        weight, bias = self.weights[prefix + ".weight"], self.weights.get(prefix + ".bias")
        return norm(x, weight, bias, self.config.layer_norm_epsilon, is_rms).stored(self.dtype)

    def _linear(self, prefix: str, x: Any) -> Bounded:
        weight, bias = self.weights[prefix + ".weight"], self.weights.get(prefix + ".bias")
        return linear(x, weight, bias).stored(self.dtype)

    def _sum(self, x: Any, y: Any) -> Bounded:
        return Bounded(x + y, U32 * abs(x + y)).stored(self.dtype)

    def embed(self, ids: Any, taps: dict[str, np.ndarray]) -> dict[str, Bounded]:
        fraction = self.config.embedding_fraction
        exact = self.weights["transformer.wte.weight"][ids]
        result = {"transformer.wte": exact}
        if self.config.has_wpe:
            wpe = self.weights["transformer.wpe.weight"][None, : ids.shape[1]]
            result["transformer.wpe"] = np.broadcast_to(wpe, exact.shape)
        whole = {n: Bounded(v, np.full(v.shape, 2.0**-1000)) for n, v in result.items()}
        hidden = self._sum(exact, result.get("transformer.wpe", 0 * exact))
        if fraction != 1:
            once = hidden.error + gamma(4) * abs(hidden.value)
            hidden = Bounded(hidden.value, once).stored(self.dtype)
        return whole | {"hidden": hidden}

    def block(self, layer: int, hidden: Any, taps: dict[str, np.ndarray]) -> dict[str, Bounded]:
        c, at = self.config, f"transformer.blocks.{layer}."
        t = {name: array.astype(np.float64) for name, array in taps.items()}
        x = hidden.astype(np.float64)
        steps = {"norm_1": self._norm(at + "norm_1", x, c.is_rmsnorm)}
        qkv = self._linear(at + "attn.Wqkv", t["norm_1"])
        if c.clip_qkv:
            qkv = Bounded(qkv.value.clip(-c.clip_qkv, c.clip_qkv), qkv.error)
        steps["attn.Wqkv"] = qkv
        d, kv = c.d_model, c.kv_n_heads * c.head_dim
        q, k, v = np.split(t["attn.Wqkv"], [d, d + kv], axis=-1)
        if c.qk_ln:
            steps["attn.q_ln"] = self._norm(at + "attn.q_ln", q, False)
            steps["attn.k_ln"] = self._norm(at + "attn.k_ln", k, False)
            q, k = t["attn.q_ln"], t["attn.k_ln"]
        q, k, v = (a.reshape(*a.shape[:2], -1, c.head_dim) for a in (q, k, v))
        context = attend(c, q, k, v, slopes(c))
        flat = Bounded(*(a.reshape(x.shape) for a in (context.value, context.error)))
        steps["attn.context"] = flat.stored(self.dtype)
        steps["attn.out_proj"] = self._linear(at + "attn.out_proj", t["attn.context"])
        steps["attn.residual"] = self._sum(x, t["attn.out_proj"])
        steps["norm_2"] = self._norm(at + "norm_2", t["attn.residual"], c.is_rmsnorm)
        steps["ffn.up_proj"] = self._linear(at + "ffn.up_proj", t["norm_2"])
        steps["ffn.act"] = gelu(t["ffn.up_proj"]).stored(self.dtype)
        steps["ffn.down_proj"] = self._linear(at + "ffn.down_proj", t["ffn.act"])
        steps["output"] = self._sum(t["attn.residual"], t["ffn.down_proj"])
        return steps

    def head(self, hidden: Any, taps: dict[str, np.ndarray]) -> dict[str, Bounded]:
        c = self.config
        x = hidden.astype(np.float64)
        table = "transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"
        logits = linear(taps["transformer.norm_f"].astype(np.float64), self.weights[table])
        if c.logit_scale is not None:
            value = logits.value * c.logit_scale
            error = (logits.error + 2 * U32 * abs(logits.value)) * abs(c.logit_scale)
            logits = Bounded(value, error * (1 + U32) + SMALLEST["float32"])
        return {"transformer.norm_f": self._norm("transformer.norm_f", x, c.is_rmsnorm)} | {
            "logits": logits
        }


@dataclasses.dataclass(frozen=True)
class Built:
    model: Model
    checkpoint: Checkpoint
    steps: Steps


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled libraries of the tests stay out of the user's cache, and are shared among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def raw() -> Callable[..., dict[str, Any]]:
    """A small config with ALiBi: fields of attn_config in a dict, of the top by keyword."""

    def make(attn: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
        small = {"d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 91, "max_seq_len": 64}
        return {**small, "no_bias": True, **top, "attn_config": {"alibi": True, **(attn or {})}}

    return make


@pytest.fixture(scope="session")
def build() -> Callable[..., Built]:
    """Compile a raw config and load random weights of the storage dtype."""

    def make(
        raw: dict[str, Any],
        dtype: str = "float32",
        operations: Callable[[int], Operations] | None = None,
        seed: int = 0,
    ) -> Built:
        config = MPTConfig.from_dict(raw)
        checkpoint = Checkpoint(config, dtype, seed)
        library = compile_model(config, dtype, "llvm", operations)
        parameters = load_parameters(config, checkpoint, dtype, mapping(config, library.layout))
        return Built(Model(library, parameters), checkpoint, Steps(config, checkpoint, dtype))

    return make


@pytest.fixture(scope="session")
def make_checkpoint() -> type[Checkpoint]:
    return Checkpoint


@pytest.fixture(scope="session")
def exact() -> types.SimpleNamespace:
    """The float64 steps with their bounds."""
    return types.SimpleNamespace(
        linear=linear, norm=norm, gelu=gelu, attend=attend, slopes=slopes, numpy=NUMPY, unit=UNIT
    )
