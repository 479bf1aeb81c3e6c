"""A third implementation, run as a script: torch and safetensors, and nothing of this package."""

from __future__ import annotations

import json
import math
import sys

import torch
from safetensors.torch import save_file

folder, target, *rest = sys.argv[1:]
wrong = [int(layer) for layer in rest]
with open(f"{folder}/config.json") as file:
    config = json.load(file)
with open(f"{folder}/pytorch_model.bin.index.json") as file:
    shards = set(json.load(file)["weight_map"].values())
w = {}
for shard in shards:
    w |= torch.load(f"{folder}/{shard}", weights_only=True)


def half(x):
    return x.half().float()


w = {name: half(tensor.float()) for name, tensor in w.items()}
d, heads = config["d_model"], config["n_heads"]
clip = config["attn_config"]["clip_qkv"]
dim = d // heads
ids = torch.tensor([[7, 3, 11, 96, 0, 42, 42, 17, 5, 60, 33, 2]])
n = ids.shape[1]

power = 2 ** math.ceil(math.log2(heads))
slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
slopes = (slopes[1::2] + slopes[::2])[:heads]
bias = torch.tensor(slopes)[:, None, None] * torch.arange(1 - n, 1).float()
mask = torch.full((n, n), -math.inf).triu(1)


def norm(x, weight):
    return half(torch.nn.functional.layer_norm(x, (d,), weight, None, 1e-5))


taps = {}
x = taps["transformer.wte"] = w["transformer.wte.weight"][ids]
taps["alibi"] = bias[:, -1:]
for layer in range(config["n_layers"]):
    at = f"transformer.blocks.{layer}."
    mine = {k.removeprefix(at): v for k, v in w.items() if k.startswith(at)}
    a = taps[at + "norm_1"] = norm(x, mine["norm_1.weight"])
    qkv = half(a @ mine["attn.Wqkv.weight"].T).clamp(-clip, clip)
    taps[at + "attn.Wqkv"] = half(qkv)
    q, k, v = (t.view(1, n, heads, dim).transpose(1, 2) for t in half(qkv).chunk(3, -1))
    scores = half(half(q @ k.transpose(2, 3)) / math.sqrt(dim))
    scores = scores + bias + mask
    c = half(half(scores.softmax(-1)) @ v).transpose(1, 2).reshape(1, n, d)
    taps[at + "attn.context"] = c
    o = taps[at + "attn.out_proj"] = half(c @ mine["attn.out_proj.weight"].T)
    x = taps[at + "attn.residual"] = half(x + o)
    b = taps[at + "norm_2"] = norm(x, mine["norm_2.weight"])
    u = taps[at + "ffn.up_proj"] = half(b @ mine["ffn.up_proj.weight"].T)
    g = u * torch.sigmoid(1.702 * u) if layer in wrong else torch.nn.functional.gelu(u)
    taps[at + "ffn.act"] = g = half(g)
    o = taps[at + "ffn.down_proj"] = half(g @ mine["ffn.down_proj.weight"].T)
    x = taps[at + "output"] = half(x + o)
x = taps["transformer.norm_f"] = norm(x, w["transformer.norm_f.weight"])
taps["logits"] = half(x @ w["transformer.wte.weight"].T)
save_file(
    {
        "input_ids": ids,
        **{k: v.half().contiguous() for k, v in taps.items() if k != "alibi"},
        "alibi": taps["alibi"].contiguous(),
    },
    target,
)
