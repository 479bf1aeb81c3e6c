"""Every peer by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from harness.errors import BadInput
from harness.subjects.peers.model import Peer

_HERE = "harness.subjects.peers"
_ALL = ("float16", "bfloat16", "float32")
_NO_CACHE = "the exported graph has no cache"
_NO_MASK = "the exported graph has no padding mask"
_GRAPH = {"left-padding": _NO_MASK, "cached-decode": _NO_CACHE}


def _peers() -> dict[str, Peer]:
    every = (
        Peer(
            "transformers",
            "MptForCausalLM.from_pretrained, on whatever it accepts",
            ("transformers", "torch"),
            ("transformers", "torch"),
            "",
            f"{_HERE}.transformers",
            _ALL,
            taps=True,
        ),
        Peer(
            "torch-compile",
            "torch.compile of transformers' MPT, with inductor",
            ("transformers", "torch"),
            ("torch", "transformers"),
            "",
            f"{_HERE}.torch_compile",
            _ALL,
            taps=True,
            cannot=_GRAPH,
        ),
        Peer(
            "torch-export",
            "torch.export of transformers' MPT, decomposed to core ATen and run",
            ("transformers", "torch"),
            ("torch", "transformers"),
            "",
            f"{_HERE}.torch_export",
            _ALL,
            taps=True,
            cannot=_GRAPH,
        ),
        Peer(
            "tvm-importer",
            "tvm.relax.frontend.torch.from_exported_program of transformers' MPT, static length",
            ("transformers", "torch", "tvm"),
            ("apache-tvm", "torch", "transformers"),
            "",
            f"{_HERE}.tvm_importer",
            _ALL,
            taps=True,
            cannot=_GRAPH,
        ),
        Peer(
            "onnxruntime",
            "torch.onnx.export of transformers' MPT, run by onnxruntime's CPU provider",
            ("onnxruntime", "onnx", "onnxscript", "transformers"),
            ("onnxruntime", "onnx", "onnxscript", "torch", "transformers"),
            "onnxruntime",
            f"{_HERE}.onnxruntime",
            ("float16", "float32"),
            taps=True,
            cannot=_GRAPH,
        ),
        Peer(
            "openvino",
            "the same ONNX file, run by OpenVINO's CPU plugin",
            ("openvino", "onnx", "onnxscript", "transformers"),
            ("openvino", "onnx", "onnxscript", "torch", "transformers"),
            "openvino",
            f"{_HERE}.openvino",
            ("float32",),
            taps=True,
            cannot=_GRAPH,
        ),
        Peer(
            "ctranslate2",
            "ctranslate2's MPTLoader and Generator",
            ("ctranslate2", "transformers"),
            ("ctranslate2", "transformers"),
            "ctranslate2",
            f"{_HERE}.ctranslate2",
            ("float32",),
            taps=False,
            cannot={
                "left-padding": "forward_batch pads on the right only",
                "cached-decode": "forward_batch takes no state",
            },
        ),
        Peer(
            "llama-cpp",
            "llama.cpp's C interface, from a GGUF file of the checkpoint",
            ("llama_cpp", "gguf", "transformers"),
            ("llama_cpp_python", "gguf"),
            "llama-cpp",
            f"{_HERE}.llama_cpp",
            # Its GELU goes through a float16 table whatever the file holds.
            ("float16",),
            taps=True,
            cannot={"left-padding": "a sequence has no padding; rows have positions of their own"},
            instead={"llama_cpp": "LLAMA_CPP_LIB_PATH"},
            version_of=f"{_HERE}.llama_api:library_version",
        ),
        Peer(
            "llm-foundry",
            "the original: llm-foundry's MPTForCausalLM, attn_impl torch",
            ("llmfoundry", "einops", "omegaconf"),
            ("llm-foundry", "torch", "transformers"),
            "",
            f"{_HERE}.llm_foundry",
            _ALL,
            taps=True,
        ),
    )
    return {peer.name: peer for peer in every}


PEERS: Mapping[str, Peer] = MappingProxyType(_peers())


def peer(name: str) -> Peer:
    """Return a peer.

    Raises
    ------
    BadInput
        If there is none of that name.
    """
    if name not in PEERS:
        near = difflib.get_close_matches(name, PEERS, n=1)
        raise BadInput(
            "there is no such peer",
            where=f"peer:{name}",
            expected=", ".join(PEERS),
            hint=f"did you mean {near[0]}?" if near else None,
        )
    return PEERS[name]
