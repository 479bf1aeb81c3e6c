"""llama.cpp's MPT does not know softmax_scale and logit_scale, and qk_ln ends the process.

Needs gguf, numpy and a built llama.cpp: the folder of its libraries as the argument, or an
installed llama-cpp-python. Writes one-block models as the converter does, with the general keys of
GGUF for the two scales added, and compares the logits with one MPT block in float64 (its GELU in
the tanh form, which is what llama.cpp computes). Exits 1 if a field is ignored or a model is not
run.
"""

import ctypes as c
import importlib.util
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

D, H, V, L = 96, 12, 64, 32


def folder() -> Path:
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        sys.exit("give the folder of libllama.so, or install llama-cpp-python")
    return Path(found.origin).parent / "lib"


def weights() -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape, gain):
        return (gain * rng.standard_normal(shape)).astype(np.float32)

    return {
        "token_embd.weight": normal(V, D, gain=1.0),
        "blk.0.attn_norm.weight": 1 + normal(D, gain=0.3),
        "blk.0.attn_qkv.weight": normal(3 * D, D, gain=1.5 / math.sqrt(D)),
        "blk.0.attn_output.weight": normal(D, D, gain=1 / math.sqrt(D)),
        "blk.0.ffn_norm.weight": 1 + normal(D, gain=0.3),
        "blk.0.ffn_up.weight": normal(4 * D, D, gain=1 / math.sqrt(D)),
        "blk.0.ffn_down.weight": normal(D, 4 * D, gain=1 / math.sqrt(4 * D)),
        "output_norm.weight": 1 + normal(D, gain=0.3),
        "blk.0.attn_q_norm.weight": 1 + normal(D, gain=0.3),
        "blk.0.attn_k_norm.weight": 1 + normal(D, gain=0.3),
    }


def written(path: str, w: dict, fields: dict) -> None:
    writer = gguf.GGUFWriter(path, "mpt")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4 * D)
    writer.add_head_count(H)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("none")
    if "softmax_scale" in fields:
        writer.add_float32("mpt.attention.scale", fields["softmax_scale"])
    if "logit_scale" in fields:
        writer.add_float32("mpt.logit_scale", fields["logit_scale"])
    for name, array in w.items():
        if fields.get("qk_ln") or ("q_norm" not in name and "k_norm" not in name):
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def expected(w: dict, ids, softmax_scale=None, logit_scale=None, qk_ln=False):
    """One block of MPT, as llm-foundry defines it but for the GELU."""
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def norm(x, gamma):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[gamma + ".weight"]

    def heads(t):
        return t.reshape(L, H, D // H).transpose(1, 0, 2)

    x = w["token_embd.weight"][ids]
    q, k, v = np.split(norm(x, "blk.0.attn_norm") @ w["blk.0.attn_qkv.weight"].T, 3, axis=-1)
    if qk_ln:
        q, k = norm(q, "blk.0.attn_q_norm"), norm(k, "blk.0.attn_k_norm")
    # 12 heads: the slopes of 16, every other one first.
    slopes = 2.0 ** (-np.arange(1, 17) * 8 / 16)
    slopes = np.concatenate([slopes[1::2], slopes[::2]])[:H]
    distance = np.arange(L)[None, :] - np.arange(L)[:, None]
    scores = heads(q) @ heads(k).transpose(0, 2, 1) * (softmax_scale or 1 / math.sqrt(D // H))
    scores = np.where(distance > 0, -np.inf, scores + slopes[:, None, None] * distance)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    x = x + (p @ heads(v)).transpose(1, 0, 2).reshape(L, D) @ w["blk.0.attn_output.weight"].T
    m = norm(x, "blk.0.ffn_norm") @ w["blk.0.ffn_up.weight"].T
    m = 0.5 * m * (1 + np.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
    x = x + m @ w["blk.0.ffn_down.weight"].T
    return norm(x, "output_norm") @ w["token_embd.weight"].T * (logit_scale or 1.0)


class Params(c.Structure):
    """llama_model_params or llama_context_params: its first fields, and room for the others."""

    _fields_ = (("sizes", c.c_uint32 * 3), ("rest", c.c_byte * 500))


class Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


def run(where: Path, path: str, ids) -> np.ndarray:
    files = [f for f in sorted(where.glob("libggml*.so")) if "libggml-cpu-" not in f.name]
    for file in [*files, *sorted(where.glob("libllama.so"))]:
        library = c.CDLL(str(file), mode=c.RTLD_GLOBAL)
        if hasattr(library, "ggml_backend_load_all_from_path"):
            library.ggml_backend_load_all_from_path(str(where).encode())
    quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda level, text, data: None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    for name, result, given in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, Params]),
        ("llama_init_from_model", c.c_void_p, [c.c_void_p, Params]),
        ("llama_batch_init", Batch, [c.c_int32, c.c_int32, c.c_int32]),
        ("llama_decode", c.c_int32, [c.c_void_p, Batch]),
        ("llama_get_logits", c.POINTER(c.c_float), [c.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, given
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    if not model:
        sys.exit("llama_model_load_from_file returned NULL")
    options = library.llama_context_default_params()
    options.sizes[:] = [64, 64, 64]  # n_ctx, n_batch, n_ubatch
    context = library.llama_init_from_model(model, options)
    batch = library.llama_batch_init(L, 0, 1)
    batch.n_tokens = L
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = int(token), at, 1
        batch.seq_id[at][0], batch.logits[at] = 0, 1
    if library.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    return np.ctypeslib.as_array(library.llama_get_logits(context), (L * V,)).reshape(L, V)


def main() -> int:
    where = folder()
    w, ids = weights(), np.random.default_rng(1).integers(0, V, L)
    wrong = 0
    for name, fields in (
        ("none of them", {}),
        ("softmax_scale=0.125", {"softmax_scale": 0.125}),
        ("logit_scale=0.125", {"logit_scale": 0.125}),
        ("qk_ln=True", {"qk_ln": True}),
    ):
        with tempfile.TemporaryDirectory() as there:
            path, out = f"{there}/model.gguf", f"{there}/logits.npy"
            written(path, w, fields)
            # In a process of its own: a failed assertion ends it.
            command = [sys.executable, __file__, str(where), path, out]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            got = np.load(out).astype(np.float64) if Path(out).exists() else None
        if got is None:
            wrong += 1
            said = [line for line in done.stderr.splitlines() if "GGML_ASSERT" in line]
            told = said[0].rpartition("/")[2] if said else done.stderr.strip()[-200:]
            print(f"{name:20} WRONG: the process ends with {done.returncode}: {told}")
            continue
        right, plain = expected(w, ids, **fields), expected(w, ids)
        size = np.abs(right).max()
        error, as_plain = (np.abs(got - t).max() / size for t in (right, plain))
        # Keys, values and the table of GELU are float16; the model without the field tells how far
        # that leads.
        ignored = bool(fields) and as_plain < error / 10
        wrong += ignored
        print(
            f"{name:20} off by {error:.1e} of the largest logit, and by {as_plain:.1e} from the "
            f"model without the field: {'WRONG' if ignored else 'right'}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) == 4:
        ids = np.random.default_rng(1).integers(0, V, L)
        np.save(sys.argv[3], run(Path(sys.argv[1]), sys.argv[2], ids))
    else:
        sys.exit(main())
