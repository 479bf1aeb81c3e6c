"""What is asked of every peer: one feature of MPT each, on weights that make it matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cases.exposure import EXPOSURES, Exposure, small_config
from cases.synthetic import ScaleProfile

HEADS = (*range(1, 13), 24)


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Attributes
    ----------
    name
        Its key.
    exposure
        Config, seed and scale of the weights.
    length
        Tokens of its one prompt: many of the peers are compiled for a length.
    paths
        Checks of the paths over a cache that have to hold; none where the plain forward is asked.
    core
        Asked in every dtype of a peer; the others in its widest alone.
    probe
        Whether the position bias is measured key by key as well. Over some hundred keys that takes
        minutes in a half precision, and the context of each layer shows the bias too.
    """

    name: str
    exposure: Exposure
    length: int = 40
    paths: tuple[str, ...] = ()
    core: bool = False
    probe: bool = True

    @property
    def shows(self) -> str:
        """What an implementation has to get right here."""
        return self.exposure.shows


def _from(name: str, key: str, **more: object) -> Feature:
    # Two layers are enough to tell one from the other; the exposure's own prompts are not used.
    return Feature(name, EXPOSURES[key], **more)  # type: ignore[arg-type]


def _features() -> dict[str, Feature]:
    base = Exposure("base", small_config(), seed=2000, shows="the plain model, 12 heads")
    loud = ScaleProfile(qkv_gain=4.0)
    storywriter = Exposure(
        "storywriter",
        small_config(attn_config={"clip_qkv": 6, "alibi_bias_max": 16}),
        seed=2001,
        shows="clip_qkv 6, an integer, and alibi_bias_max 16, as mpt-7b-storywriter has them",
        profile=loud,
    )
    heads = tuple(
        Feature(
            f"heads-{count}",
            Exposure(
                f"peer-heads-{count}",
                small_config(count, n_layers=1),
                seed=2100 + count,
                shows=f"the slopes of {count} heads",
            ),
        )
        for count in HEADS
    )
    long = replace(EXPOSURES["long-12-heads"], name="long")
    every = (
        Feature("base", base, core=True),
        *heads,
        _from("clip", "clip", core=True),
        _from("bias-max-16", "bias-max-16-heads-12", core=True),
        Feature("storywriter", storywriter),
        _from("softmax-scale", "softmax-scale", core=True),
        _from("logit-scale", "logit-scale"),
        _from("qk-ln", "qk-ln"),
        _from("multi-query", "multi-query"),
        _from("grouped-query", "grouped-query"),
        _from("biases", "biases"),
        _from("no-alibi", "wpe"),
        _from("expansion-2", "expansion-2"),
        Feature("long-context", long, length=600, core=True, probe=False),
        Feature("left-padding", base, paths=("left-padding",), core=True),
        Feature(
            "cached-decode",
            base,
            paths=("prefill", "decode", "extend", "chunks"),
            core=True,
        ),
    )
    return {feature.name: feature for feature in every}


FEATURES: Mapping[str, Feature] = MappingProxyType(_features())
