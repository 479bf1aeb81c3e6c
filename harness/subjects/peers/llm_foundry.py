"""The original: llm-foundry's own MPT, of which only the model's files are imported.

llm-foundry wants a training stack and pins that nothing else here can live with. Its model needs
torch, einops, omegaconf and an older transformers; `tox -e foundry` makes such an environment. What
its packages import beside the model is stood in for, and never called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoint.reader import Checkpoint
from harness.subjects.parts import TorchParts, to_numpy
from harness.subjects.peers.hub import TORCH, reference_config
from harness.subjects.peers.rows import Row, RowByRow
from harness.subjects.protocol import Array, Rounding

_BARE = ("", ".models", ".models.utils", ".utils", ".interfaces", ".models.mpt")
"""Packages whose ``__init__`` imports the training stack, relative to llmfoundry."""
_STOOD_IN = ("composer", "composer.models", "composer.utils", "composer.core", "composer.loggers")


def modelling() -> tuple[Any, Any]:
    """Return llm-foundry's modules of the config and of the model.

    Raises
    ------
    ModuleNotFoundError
        If llm-foundry or what its model needs is not installed.
    """
    if "llmfoundry" not in sys.modules:
        found = importlib.util.find_spec("llmfoundry")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'llmfoundry'", name="llmfoundry")
        root = Path(found.submodule_search_locations[0])
        for name in _STOOD_IN:
            sys.modules.setdefault(name, _stand_in(name))
        for name in _BARE:
            package = ModuleType(f"llmfoundry{name}")
            package.__path__ = [str(root.joinpath(*name.split(".")))]
            # Whoever asks afterwards whether it is installed looks for a spec.
            package.__spec__ = ModuleSpec(package.__name__, None, is_package=True)
            package.__spec__.submodule_search_locations = package.__path__
            sys.modules[package.__name__] = package
    config = importlib.import_module("llmfoundry.models.mpt.configuration_mpt")
    model = importlib.import_module("llmfoundry.models.mpt.modeling_mpt")
    return config, model


def _stand_in(name: str) -> Any:
    class _Class:
        """Is derived from and never made."""

    module: Any = MagicMock(name=name)
    module.__path__, module.__spec__, module.__name__ = [], None, name
    module.HuggingFaceModel = module.Callback = module.LoggerDestination = _Class
    return module


def load_original(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Return the original's model with a checkpoint's weights, in any dtype that torch has."""
    with warnings.catch_warnings():
        # Of the original about itself and about releases of torch that it does not know.
        warnings.simplefilter("ignore")
        return _load_original(checkpoint, dtype)


def _load_original(checkpoint: Path, dtype: torch.dtype) -> Any:
    config_module, model_module = modelling()
    opened = Checkpoint.open(checkpoint)
    raw = dict(opened.config)
    attention = {**raw.pop("attn_config", {}), "attn_impl": "torch"}
    if not attention.get("prefix_lm"):
        # A field of earlier releases, which this one no longer takes.
        attention.pop("prefix_lm", None)
    for name in ("model_type", "architectures", "auto_map", "torch_dtype", "transformers_version"):
        raw.pop(name, None)
    config = config_module.MPTConfig(
        **{**raw, "init_device": "cpu", "attn_config": attention},
    )
    before = torch.get_default_dtype()
    # Buffers and tables are made in the default dtype.
    torch.set_default_dtype(dtype if dtype == torch.float64 else torch.float32)
    try:
        model = model_module.MPTForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    state = {
        name: torch.from_numpy(opened.read(name).astype(np.float64)).to(dtype)
        for name in opened.names
    }
    model = model.to(dtype)
    left = model.load_state_dict(state, strict=False)
    missing = [n for n in left.missing_keys if not n.endswith("lm_head.weight")]
    if missing or left.unexpected_keys:
        raise RuntimeError(f"missing {missing}, unexpected {left.unexpected_keys}")
    return model.eval().requires_grad_(False)


class _Parts:
    """The original's parts, called one by one with its own mask and bias."""

    def __init__(self, config: Any, model: Any, dtype: torch.dtype) -> None:
        self.config, self.model, self.dtype = config, model, dtype

    @torch.no_grad()
    def forward(self, ids: Any) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(input_ids=_ids(ids)).logits
        return logits

    @torch.no_grad()
    def embed(self, ids: Any) -> dict[str, Tensor]:
        """Return the rows of the tables."""
        transformer = self.model.transformer
        taps = {"transformer.wte": transformer.wte(_ids(ids))}
        if self.config.has_wpe:
            positions = torch.arange(_ids(ids).shape[1])[None]
            rows = transformer.wpe(positions)
            taps["transformer.wpe"] = rows.expand_as(taps["transformer.wte"])
        return taps

    @torch.no_grad()
    def block(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Return every tap of one block, seen by hooks."""
        transformer = self.model.transformer
        block = transformer.blocks[layer]
        hidden = hidden.to(self.dtype)
        seen: dict[str, Tensor] = {}

        def keep(name: str, source: str) -> Any:
            def hook(_: Any, given: Any, made: Any) -> None:
                value = given[0] if source == "in" else made
                seen[name] = value[0] if isinstance(value, tuple) else value

            return hook

        attn, ffn = block.attn, block.ffn
        places = [
            (block.norm_1, "norm_1", "out"),
            (attn.Wqkv, "attn.Wqkv", "out"),
            (attn.out_proj, "attn.context", "in"),
            (attn.out_proj, "attn.out_proj", "out"),
            (block.norm_2, "attn.residual", "in"),
            (block.norm_2, "norm_2", "out"),
            (ffn.up_proj, "ffn.up_proj", "out"),
            (ffn.down_proj, "ffn.act", "in"),
            (ffn.down_proj, "ffn.down_proj", "out"),
            (block, "output", "out"),
        ]
        if self.config.qk_ln:
            places += [(attn.q_ln, "attn.q_ln", "out"), (attn.k_ln, "attn.k_ln", "out")]
        blocks, learned = transformer.blocks, transformer.learned_pos_emb
        with ExitStack() as stack:
            for module, name, source in places:
                stack.callback(module.register_forward_hook(keep(name, source)).remove)
            transformer.blocks = nn.ModuleList([block])
            # The stream has its positions already.
            transformer.learned_pos_emb = False
            try:
                transformer(inputs_embeds=hidden)
            finally:
                transformer.blocks, transformer.learned_pos_emb = blocks, learned
        clip = attn.clip_qkv
        if clip:
            seen["attn.Wqkv"] = seen["attn.Wqkv"].clamp(min=-clip, max=clip)
        return seen

    @torch.no_grad()
    def head(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return the final norm and the logits, as ``MPTForCausalLM.forward`` makes them."""
        model = self.model
        norm_f = model.transformer.norm_f(hidden.to(self.dtype))
        if model.lm_head is not None:
            logits = model.lm_head(norm_f)
        else:
            logits = model.transformer.wte(norm_f, True)
        if model.logit_scale is not None:
            logits = logits * model.logit_scale
        return {"transformer.norm_f": norm_f, "logits": logits}


def _ids(ids: Any) -> Tensor:
    return torch.from_numpy(np.array(ids)).to(torch.long)


class LLMFoundrySubject(RowByRow, TorchParts):
    """llm-foundry's model, part by part, and over its cache.

    Parameters
    ----------
    checkpoint
        Directory in the hub layout.
    dtype
        Storage dtype.
    """

    protocol = 2
    rounding = Rounding()

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        model = load_original(checkpoint, TORCH[dtype])
        parts = _Parts(reference_config(checkpoint), model, TORCH[dtype])
        super().__init__(parts, "llm-foundry-cpu", dtype)

    def parameters(self) -> dict[str, Array]:
        """Return the weights as they are held."""
        from harness.subjects.peers.hub import held

        return {name: held(value) for name, value in self._model.model.state_dict().items()}

    def _no_past(self) -> Any:
        # It makes its own, as long as it is given none.
        return None

    def _run_on(self, row: Row, ids: Any) -> Array:
        out = self._model.model(
            input_ids=ids, attention_mask=row.mask, past_key_values=row.cache, use_cache=True
        )
        row.cache = out.past_key_values
        return to_numpy(out.logits)[0]


def load(checkpoint: Path, *, dtype: str, target: str) -> LLMFoundrySubject:
    """Make the subject; ``target`` is not used."""
    return LLMFoundrySubject(checkpoint, dtype)
