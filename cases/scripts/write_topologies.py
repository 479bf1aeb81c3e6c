"""Write `cases/topologies/*.txt`: a released model each, one `NAME torch.Size([…])` a line.

It takes the sizes from its own table below and not from `cases.topology` or `cases/configs`: a
mistake in those does not travel into the files they are tested against. Plain features only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "topologies"


@dataclass(frozen=True)
class Sizes:
    """What a released model's table follows from."""

    rows: int
    width: int
    layers: int
    fused: int
    query_norm: int = 0
    key_norm: int = 0


MODELS = {
    "mpt-7b-instruct": Sizes(50432, 4096, 32, 12288),
    "mpt-7b-storywriter": Sizes(50432, 4096, 32, 12288),
    "mpt-30b": Sizes(50432, 7168, 48, 21504),
    "mpt-1b": Sizes(50368, 2048, 24, 6144, 2048, 2048),
    # 24 query heads and 2 x 8 key/value heads of 128.
    "replit-code-v1.5": Sizes(32768, 3072, 32, 5120),
}


def lines(sizes: Sizes) -> list[str]:
    """One line a tensor."""
    w = sizes.width
    out = [f"transformer.wte.weight torch.Size([{sizes.rows}, {w}])"]
    for i in range(sizes.layers):
        block = f"transformer.blocks.{i}."
        out.append(f"{block}norm_1.weight torch.Size([{w}])")
        out.append(f"{block}attn.Wqkv.weight torch.Size([{sizes.fused}, {w}])")
        if sizes.query_norm:
            out.append(f"{block}attn.q_ln.weight torch.Size([{sizes.query_norm}])")
            out.append(f"{block}attn.k_ln.weight torch.Size([{sizes.key_norm}])")
        out.append(f"{block}attn.out_proj.weight torch.Size([{w}, {w}])")
        out.append(f"{block}norm_2.weight torch.Size([{w}])")
        out.append(f"{block}ffn.up_proj.weight torch.Size([{4 * w}, {w}])")
        out.append(f"{block}ffn.down_proj.weight torch.Size([{w}, {4 * w}])")
    out.append(f"transformer.norm_f.weight torch.Size([{w}])")
    return out


def main() -> None:
    """Write every file."""
    OUTPUT.mkdir(exist_ok=True)
    for name, sizes in MODELS.items():
        (OUTPUT / f"{name}.txt").write_text("\n".join(lines(sizes)) + "\n")


if __name__ == "__main__":
    main()
