"""MptConfig refuses config.json of released MPT models.

Needs transformers. Exits 1 if a value that llm-foundry takes is refused.
"""

import sys

import transformers
from transformers import MptConfig

RELEASED = {
    "clip_qkv: 6 (an integer; mpt-7b-storywriter, mpt-7b-8k)": {"attn_config": {"clip_qkv": 6}},
    "attn_pdrop: 0.0 (a float)": {"attn_config": {"attn_pdrop": 0.0}},
    "softmax_scale: 1 (an integer)": {"attn_config": {"softmax_scale": 1}},
    "logit_scale: 1 (an integer)": {"logit_scale": 1},
    "embedding_fraction: 1 (an integer)": {"embedding_fraction": 1},
    "attn_type: grouped_query_attention": {"attn_config": {"attn_type": "grouped_query_attention"}},
}


def main() -> int:
    print("transformers", transformers.__version__)
    refused = 0
    for name, fields in RELEASED.items():
        try:
            MptConfig(**fields)
        except Exception as error:
            refused += 1
            print(f"{name}: REFUSED: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        else:
            print(f"{name}: taken")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
