"""ctranslate2's MPTLoader drops config fields that change the model.

Needs ctranslate2, torch and transformers (the loader's own module imports both). The model that is
converted has the module tree of the original's remote code, for which the loader is registered.
Prints how far the logits are from what each field means, and exits 1 if any of them is dropped.
"""

import math
import sys
import tempfile
from types import SimpleNamespace as Node

import ctranslate2
import numpy as np
import torch
import torch.nn.functional as F
from ctranslate2.converters.transformers import _MODEL_LOADERS

D, H, V, L, R = 96, 12, 64, 32, 4


def slopes(heads: int, bias_max: float) -> torch.Tensor:
    """As gen_slopes of llm-foundry: models/layers/attention.py."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float64) * bias_max / power
    values = 2.0**-exponents
    return values if power == heads else torch.cat([values[1::2], values[::2]])[:heads]


def weights() -> dict:
    g = torch.Generator().manual_seed(0)

    def normal(*shape, gain=1.0):
        return torch.randn(*shape, generator=g) * gain

    return {
        "wte": normal(V, D),
        "norm_1": 1 + 0.3 * normal(D),
        "Wqkv": normal(3 * D, D, gain=1.5 / math.sqrt(D)),
        "out_proj": normal(D, D, gain=1 / math.sqrt(D)),
        "norm_2": 1 + 0.3 * normal(D),
        "up_proj": normal(R * D, D, gain=1 / math.sqrt(D)),
        "down_proj": normal(D, R * D, gain=1 / math.sqrt(R * D)),
        "norm_f": 1 + 0.3 * normal(D),
        "q_ln": 1 + 0.3 * normal(D),
        "k_ln": 1 + 0.3 * normal(D),
        "wpe": normal(64, D),
        "norm_1.bias": 0.3 * normal(D),
        "norm_2.bias": 0.3 * normal(D),
        "norm_f.bias": 0.3 * normal(D),
    }


def converted(w: dict, attn_config: dict, fields: dict, folder: str) -> ctranslate2.Generator:
    def module(name):
        made = Node(weight=w[name])
        if not fields.get("no_bias", True) and name + ".bias" in w:
            made.bias = w[name + ".bias"]
        return made

    block = Node(
        norm_1=module("norm_1"),
        norm_2=module("norm_2"),
        attn=Node(**{n: module(n) for n in ("Wqkv", "out_proj", "q_ln", "k_ln")}),
        ffn=Node(up_proj=module("up_proj"), down_proj=module("down_proj")),
    )
    model = Node(
        config=Node(
            d_model=D,
            n_heads=H,
            n_layers=1,
            vocab_size=V,
            max_seq_len=64,
            attn_config=attn_config,
            **fields,
        ),
        transformer=Node(**{n: module(n) for n in ("wte", "wpe", "norm_f")}, blocks=[block]),
    )
    tokenizer = Node(
        get_vocab=lambda: {f"<{i}>": i for i in range(V)},
        bos_token="<0>",
        eos_token="<0>",
        unk_token="<0>",
    )
    spec = _MODEL_LOADERS["MPTConfig"](model, tokenizer)
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(folder)
    return ctranslate2.Generator(folder, device="cpu", compute_type="float32")


def expected(
    w, ids, bias_max=8.0, clip=None, scale=None, logit_scale=None, qk_ln=False, biases=False,
    alibi=True,
):  # fmt: skip
    """One block of MPT, written out in float64."""
    w = {k: v.double() for k, v in w.items()}

    def norm(x, name):
        return F.layer_norm(x, (D,), w[name], w[name + ".bias"] if biases else None)

    x = w["wte"][ids] if alibi else w["wte"][ids] + w["wpe"][:L]
    qkv = norm(x, "norm_1") @ w["Wqkv"].T
    if clip is not None:
        qkv = qkv.clamp(-clip, clip)
    q, k, v = qkv.split(D, dim=2)
    if qk_ln:
        q, k = F.layer_norm(q, (D,), w["q_ln"]), F.layer_norm(k, (D,), w["k_ln"])
    q, k, v = (t.view(1, L, H, D // H).transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(L)[None, :] - torch.arange(L)[:, None]
    scores = q @ k.transpose(2, 3) * (scale or 1 / math.sqrt(D // H))
    if alibi:
        scores = scores + slopes(H, bias_max)[:, None, None] * distance
    scores = scores.masked_fill(distance > 0, float("-inf"))
    x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, L, D) @ w["out_proj"].T
    x = x + F.gelu(norm(x, "norm_2") @ w["up_proj"].T) @ w["down_proj"].T
    logits = norm(x, "norm_f") @ w["wte"].T
    return logits if logit_scale is None else logits * logit_scale


def main() -> int:
    print("ctranslate2", ctranslate2.__version__)
    w = weights()
    ids = torch.randint(0, V, (1, L), generator=torch.Generator().manual_seed(1))
    dropped = 0
    for name, attn_config, fields, meaning in (
        ("defaults", {"alibi": True}, {}, {}),
        ("attn_config.clip_qkv=1", {"alibi": True, "clip_qkv": 1.0}, {}, {"clip": 1.0}),
        (
            "attn_config.alibi_bias_max=16",
            {"alibi": True, "alibi_bias_max": 16},
            {},
            {"bias_max": 16.0},
        ),
        (
            "attn_config.softmax_scale=0.125",
            {"alibi": True, "softmax_scale": 0.125},
            {},
            {"scale": 0.125},
        ),
        ("logit_scale=0.125", {"alibi": True}, {"logit_scale": 0.125}, {"logit_scale": 0.125}),
        ("attn_config.qk_ln=True", {"alibi": True, "qk_ln": True}, {}, {"qk_ln": True}),
        ("no_bias=False, of the norms", {"alibi": True}, {"no_bias": False}, {"biases": True}),
        ("attn_config.alibi=False", {"alibi": False}, {}, {"alibi": False}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            generator = converted(w, attn_config, fields, folder)
            given = ctranslate2.StorageView.from_array(ids.numpy().astype(np.int32))
            ends = ctranslate2.StorageView.from_array(np.array([L], np.int32))
            got = torch.from_numpy(np.array(generator.forward_batch(given, ends))).double()
        right, plain = expected(w, ids, **meaning), expected(w, ids)
        scale = right.abs().max()
        error, as_plain = ((got - t).abs().max() / scale for t in (right, plain))
        same = (got.argmax(-1) == right.argmax(-1)).double().mean()
        # float32 against float64, with sums of at most 384 terms in a row of four products.
        wrong = error > 4 * 384 * torch.finfo(torch.float32).eps
        dropped += bool(wrong)
        print(
            f"{name:32} off by {error:.1e} of the largest logit, top-1 agrees at {same:.2f}; "
            f"last logit {got[0, -1, 0]:.6f}, expected {right[0, -1, 0]:.6f}; "
            f"{'WRONG' if wrong else 'right'}"
            + (f", and off by {as_plain:.1e} from the model without the field" if wrong else "")
        )
    return 1 if dropped else 0


if __name__ == "__main__":
    sys.exit(main())
