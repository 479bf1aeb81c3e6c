"""transformers' MPT reads config fields and does not use them.

Needs torch and transformers. Prints, for each field, how far the logits are from what the field
means in llm-foundry, and exits 1 if any of them is ignored.
"""

import math
import sys

import torch
import torch.nn.functional as F
import transformers
from transformers import MptConfig, MptForCausalLM

D, H, V, L = 96, 12, 64, 32


def slopes(heads: int, bias_max: float) -> torch.Tensor:
    """As gen_slopes of llm-foundry: models/layers/attention.py."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float64) * bias_max / power
    values = 2.0**-exponents
    return values if power == heads else torch.cat([values[1::2], values[::2]])[:heads]


def expected(model, ids, bias_max=8.0, clip=None, logit_scale=None):
    """One block of MPT, written out in float64."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    x = w["transformer.wte.weight"][ids]
    p = "transformer.blocks.0."
    a = F.layer_norm(x, (D,), w[p + "norm_1.weight"])
    qkv = a @ w[p + "attn.Wqkv.weight"].T
    if clip is not None:
        qkv = qkv.clamp(-clip, clip)
    q, k, v = (t.view(1, L, H, D // H).transpose(1, 2) for t in qkv.split(D, dim=2))
    distance = torch.arange(L)[None, :] - torch.arange(L)[:, None]
    scores = q @ k.transpose(2, 3) / math.sqrt(D // H)
    scores = scores + slopes(H, bias_max)[:, None, None] * distance
    scores = scores.masked_fill(distance > 0, float("-inf"))
    context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, L, D)
    x = x + context @ w[p + "attn.out_proj.weight"].T
    m = F.layer_norm(x, (D,), w[p + "norm_2.weight"])
    m = F.gelu(m @ w[p + "ffn.up_proj.weight"].T) @ w[p + "ffn.down_proj.weight"].T
    x = F.layer_norm(x + m, (D,), w["transformer.norm_f.weight"])
    logits = x @ w["transformer.wte.weight"].T
    return logits if logit_scale is None else logits * logit_scale


def run(attn_config=None, **fields):
    torch.manual_seed(0)
    config = MptConfig(
        d_model=D,
        n_heads=H,
        n_layers=1,
        vocab_size=V,
        max_seq_len=64,
        attn_config=attn_config or {},
        attn_implementation="eager",
        **fields,
    )
    model = MptForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0 if "Wqkv" in name else 3.0)
    return model


def main() -> int:
    print("transformers", transformers.__version__, "torch", torch.__version__)
    ids = torch.randint(0, V, (1, L), generator=torch.Generator().manual_seed(1))
    cases = {
        "defaults": (run(), {}),
        "attn_config.clip_qkv=1.5": (run({"clip_qkv": 1.5}), {"clip": 1.5}),
        "attn_config.alibi_bias_max=16": (run({"alibi_bias_max": 16}), {"bias_max": 16.0}),
        "logit_scale=0.125": (run(logit_scale=0.125), {"logit_scale": 0.125}),
    }
    ignored = 0
    for name, (model, meaning) in cases.items():
        with torch.no_grad():
            got = model(input_ids=ids).logits.double()
            right, plain = expected(model, ids, **meaning), expected(model, ids)
        scale = right.abs().max()
        error, as_plain = ((got - t).abs().max() / scale for t in (right, plain))
        same = (got.argmax(-1) == right.argmax(-1)).double().mean()
        # float32 against float64, with sums of at most 384 terms in a row of four products.
        wrong = error > 4 * 384 * torch.finfo(torch.float32).eps
        ignored += bool(wrong)
        print(
            f"{name:32} off by {error:.1e} of the largest logit, top-1 agrees at {same:.2f}; "
            f"last logit {got[0, -1, 0]:.6f}, expected {right[0, -1, 0]:.6f}; "
            f"{'WRONG' if wrong else 'right'}"
            + (f", and off by {as_plain:.1e} from the model without the field" if wrong else "")
        )
    # Fields that decide which weights there are: nothing of them is built.
    for name, model, wanted in (
        ("attn_config.qk_ln=True", run({"qk_ln": True}), "q_ln"),
        ("no_bias=False", run(no_bias=False), "bias"),
        ("attn_config.alibi=False", run({"alibi": False}), "wpe"),
        ("expansion_ratio=2", run(expansion_ratio=2), None),
    ):
        shape = tuple(model.transformer.blocks[0].ffn.up_proj.weight.shape)
        built = (
            shape[0] == 2 * D if wanted is None else any(wanted in n for n in model.state_dict())
        )
        ignored += not built
        what = f"up_proj {shape}, expected ({2 * D}, {D})" if wanted is None else f"no {wanted}"
        print(f"{name:32} {'right' if built else 'WRONG: ' + what}")
    return 1 if ignored else 0


if __name__ == "__main__":
    sys.exit(main())
