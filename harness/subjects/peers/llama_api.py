"""What is used of llama.cpp's C interface, and whether a library has it in the same shape.

The library is that of the installed llama-cpp-python, or the one in the folder that the variable
``LLAMA_CPP_LIB_PATH`` names, as of the npm package ``@node-llama-cpp/linux-x64``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from harness.subjects.peers.model import NotSupported

VARIABLE = "LLAMA_CPP_LIB_PATH"
EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class ModelParams(ctypes.Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("unknown", c_void_p * 8),
    )


class ContextParams(ctypes.Structure):
    """``llama_context_params``."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", EvalCallback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("unknown", c_void_p * 8),
    )


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", ctypes.POINTER(c_float)),
        ("pos", ctypes.POINTER(c_int32)),
        ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))),
        ("logits", ctypes.POINTER(c_int8)),
    )


_LLAMA: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (ctypes.POINTER(c_float), (c_void_p,)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_free": (None, (c_void_p,)),
}
_GGML: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_load_all_from_path": (None, (c_char_p,)),
    "ggml_get_name": (c_char_p, (c_void_p,)),
    "ggml_op_desc": (c_char_p, (c_void_p,)),
    "ggml_nelements": (ctypes.c_int64, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_is_contiguous": (c_bool, (c_void_p,)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}


def folder() -> Path | None:
    """Return where the library lies, or ``None``."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "lib"


class Api:
    """The functions, by their names."""

    def __init__(self, where: Path) -> None:
        # A failed assertion of ggml ends the process; a debugger's account of it helps nobody here.
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        self._bind(sorted(where.glob("libllama*.so")), _LLAMA)
        kernels = "libggml-cpu-"
        self._bind(
            [file for file in sorted(where.glob("libggml*.so")) if kernels not in file.name], _GGML
        )
        self._silent = _LogCallback(lambda level, text, data: None)
        self.llama_log_set(self._silent, None)
        # The kernels may be libraries of their own, one for each kind of processor.
        self.ggml_backend_load_all_from_path(str(where).encode())
        self.llama_backend_init()

    def _bind(self, files: list[Path], functions: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
        libraries = [ctypes.CDLL(str(file)) for file in files]
        for name, (result, arguments) in functions.items():
            found = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if found is None:
                raise NotSupported(f"the library of llama.cpp has no {name}", where=VARIABLE)
            found.restype, found.argtypes = result, arguments
            setattr(self, name, found)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def require_layout(self) -> None:
        """Refuse a library whose structures have other fields, by the defaults that are known.

        Raises
        ------
        NotSupported
            If a field does not hold its default.
        """
        found = self.llama_context_default_params()
        known = {
            "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1,
            "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
            "yarn_ext_factor": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True,
        }  # fmt: skip
        wrong = {
            name: getattr(found, name) for name in known if getattr(found, name) != known[name]
        }
        model = self.llama_model_default_params()
        if wrong or not model.use_extra_bufts or model.vocab_only or model.main_gpu != 0:
            raise NotSupported(
                "this release of llama.cpp lays out its parameters in another way",
                where=VARIABLE,
                found=wrong,
            )


@cache
def api() -> Api:
    """Return the interface of the library that is there.

    Raises
    ------
    NotSupported
        If it is not the one that is known here.
    """
    where = folder()
    assert where is not None, "checked before"
    made = Api(where)
    made.require_layout()
    return made


def library_version() -> str:
    """Return what the library calls itself."""
    where = folder()
    if where is None:
        return ""
    for file in sorted(where.glob("libllama*.so")):
        library = ctypes.CDLL(str(file))
        if hasattr(library, "llama_version"):
            library.llama_version.restype = c_char_p
            return bytes(library.llama_version()).decode()
    return ""
