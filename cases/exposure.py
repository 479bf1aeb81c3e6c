"""Checkpoints made on demand for what the trained one cannot show.

Each turns one feature on, in a model where its absence changes the logits. `materialise` writes the
weights into a cache; nothing of this is committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from cases.prompts import Prompt
from cases.synthetic import DEFAULT_PROFILE, ScaleProfile, make_checkpoint

HERE = Path(__file__).resolve().parent
RECIPE_FILES = ("synthetic.py", "hub_layout.py", "topology.py", "scripts/pickled_shard.py")
PUBLISHED: dict[str, Any] = json.loads((HERE / "configs" / "mpt-7b-instruct.json").read_text())


@dataclass(frozen=True)
class Exposure:
    """A config and weights that make one feature matter.

    Attributes
    ----------
    name
        Its key in `EXPOSURES`.
    config
        Every field of config.json, in the original's names.
    seed, profile
        What the weights follow from.
    lengths
        Of its prompts.
    shows
        What an implementation has to get right here.
    """

    name: str
    config: Mapping[str, Any]
    seed: int
    shows: str
    lengths: tuple[int, ...] = (1, 2, 31, 64)
    profile: ScaleProfile = field(default=DEFAULT_PROFILE)

    def prompts(self) -> tuple[Prompt, ...]:
        """One prompt of random ids for each length, the same ones every time."""
        return tuple(
            Prompt(
                f"{self.name}.{length}",
                tuple(
                    np.random.default_rng([self.seed, length])
                    .integers(0, self.config["vocab_size"], length)
                    .tolist()
                ),
            )
            for length in self.lengths
        )


def small_config(heads: int = 12, head_dim: int = 8, **changes: Any) -> dict[str, Any]:
    """mpt-7b-instruct's config, small, with `changes`; of ``attn_config`` the changes suffice."""
    attention = PUBLISHED["attn_config"] | changes.pop("attn_config", {})
    sizes = {
        "d_model": heads * head_dim,
        "max_seq_len": 64,
        "n_heads": heads,
        "n_layers": 2,
        "vocab_size": 211,
    }
    return PUBLISHED | sizes | changes | {"attn_config": attention}


def _attention(**changes: Any) -> dict[str, Any]:
    return small_config(attn_config=changes)


def _build() -> dict[str, Exposure]:
    made: dict[str, Exposure] = {}

    def add(name: str, shows: str, config: dict[str, Any], **more: Any) -> None:
        made[name] = Exposure(name, config, seed=1000 + len(made), shows=shows, **more)

    loud = ScaleProfile(qkv_gain=2.5)
    add(
        "clip",
        "clip_qkv 1.5 lies below the activations, of queries, keys and values",
        _attention(clip_qkv=1.5),
        profile=loud,
    )
    for heads in (12, 24):
        add(
            f"bias-max-16-heads-{heads}",
            "alibi_bias_max 16, with slopes that are no powers of two or of an odd order",
            small_config(heads, attn_config={"alibi_bias_max": 16}),
        )
    add("qk-ln", "layer norms of all queries and of all keys", _attention(qk_ln=True))
    add("multi-query", "one key/value head", _attention(attn_type="multiquery_attention"))
    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": 4}
    add("grouped-query", "4 key/value heads for 12 queries", _attention(**grouped))
    add(
        "grouped-query-qk-ln",
        "a key norm narrower than the query norm, with biases",
        small_config(no_bias=False, attn_config=grouped | {"qk_ln": True}),
    )
    add("logit-scale", "logit_scale as a number", small_config(logit_scale=0.125))
    add(
        "logit-scale-inverse-root",
        "logit_scale 'inv_sqrt_d_model'",
        small_config(logit_scale="inv_sqrt_d_model"),
    )
    add("softmax-scale", "softmax_scale in place of 1/sqrt(8)", _attention(softmax_scale=0.125))
    add("biases", "a bias at every projection and norm", small_config(no_bias=False))
    add(
        "wpe",
        "learned positions, no ALiBi",
        small_config(learned_pos_emb=True, attn_config={"alibi": False}),
    )
    add(
        "no-positions",
        "neither ALiBi nor learned positions",
        small_config(learned_pos_emb=False, attn_config={"alibi": False}),
    )
    add("rmsnorm", "RMS norms: the mean is not taken off", small_config(norm_type="rmsnorm"))
    add(
        "rmsnorm-biases",
        "RMS norms have no bias where projections have one",
        small_config(norm_type="low_precision_rmsnorm", no_bias=False),
    )
    for ratio in (2, 3, 1.5):
        add(f"expansion-{ratio}", f"expansion_ratio {ratio}", small_config(expansion_ratio=ratio))
    add("untied", "a head of its own", small_config(tie_word_embeddings=False))
    for heads in (3, 5, 7, 40):
        add(
            f"heads-{heads}",
            f"the interleaved slopes of {heads} heads",
            small_config(heads),
        )
    add(
        "long-12-heads",
        "512 tokens and more: half-precision bias shows in slopes that are no powers of two",
        small_config(max_seq_len=640),
        lengths=(513, 640),
    )
    add(
        "long-32-heads-bias-max-16",
        "slopes down to 1.5e-5, subnormal in float16",
        small_config(32, max_seq_len=640, attn_config={"alibi_bias_max": 16}),
        lengths=(640,),
    )
    add(
        "small-embedding",
        "a stream whose variance is near the norms' epsilon, in every layer",
        small_config(),
        profile=ScaleProfile(embedding_std=0.004, residual_gain=0.002),
    )
    add(
        "vocabulary-padding",
        "rows of the embedding beyond the tokenizer's 1024 ids get logits",
        small_config(vocab_size=1088),
    )
    add("embedding-fraction", "a training-only field", small_config(embedding_fraction=0.7))
    add(
        "loud-scores",
        "unscaled scores in the hundreds: rounding them before the softmax shows",
        small_config(head_dim=32),
        profile=ScaleProfile(qkv_gain=2.5, gamma_outliers=4),
    )
    add(
        "block-7b",
        "one block and both ends at the sizes of mpt-7b: long reductions",
        PUBLISHED | {"n_layers": 1},
    )
    # A seed follows from the place: what is new comes last.
    add(
        "clip-qk-ln",
        "queries and keys are clipped and then normalised, values are clipped alone",
        _attention(clip_qkv=1.5, qk_ln=True),
        profile=loud,
    )
    add(
        "clip-biases",
        "the bias is added before clipping",
        small_config(no_bias=False, attn_config={"clip_qkv": 1.5}),
        profile=loud,
    )
    add(
        "epsilon-1e-6",
        "layer_norm_epsilon 1e-6, and a stream whose variance is near it",
        small_config(layer_norm_epsilon=1e-6),
        profile=ScaleProfile(embedding_std=0.004, residual_gain=0.002),
    )
    add(
        "layers-12",
        "layers 10 and 11, which come before 2 where names are sorted as text",
        small_config(5, n_layers=12),
    )
    return made


EXPOSURES: Mapping[str, Exposure] = MappingProxyType(_build())


def materialise(exposure: str | Exposure, cache_dir: Path, dtype: str) -> Path:
    """Folder of the checkpoint of an exposure; written on the first call, complete or not at all.

    The folder's name holds a digest of all that the weights follow from: config, seed, profile,
    dtype, NumPy's version and the source that makes them. A change of any of these makes another
    folder, so a stale one is never found.

    Parameters
    ----------
    exposure
        A key of `EXPOSURES`, or an `Exposure` of your own.
    cache_dir
        Made if it is not there. Several processes may share it.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Raises
    ------
    KeyError
        An unknown name; the message lists the known ones.
    """
    if isinstance(exposure, str):
        if exposure not in EXPOSURES:
            raise KeyError(f"{exposure!r}: expected one of {', '.join(EXPOSURES)}")
        exposure = EXPOSURES[exposure]
    target = cache_dir / f"{exposure.name}-{dtype}-{_digest(exposure, dtype)}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix=exposure.name, suffix=".partial"))
    try:
        make_checkpoint(
            partial,
            exposure.config,
            seed=exposure.seed,
            dtype=dtype,
            scale_profile=exposure.profile,
        )
        partial.chmod(0o755)
        # Another process may have been faster; its folder holds the same bytes.
        with contextlib.suppress(OSError):
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not target.is_dir():
        raise OSError(f"{target}: could not be written")
    return target


def _digest(exposure: Exposure, dtype: str) -> str:
    recipe = {
        "config": dict(exposure.config),
        "seed": exposure.seed,
        "profile": dataclasses.asdict(exposure.profile),
        "dtype": dtype,
        "numpy": np.__version__,
        "source": [hashlib.sha256((HERE / file).read_bytes()).hexdigest() for file in RECIPE_FILES],
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
