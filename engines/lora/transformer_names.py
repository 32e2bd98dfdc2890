"""The modules of SD 3's transformer under its first authors' names, which trainers and interfaces write, as diffusers'.

Where the first authors have one matrix for queries, keys and values, diffusers has three: each is a third of its rows.
Where they have shift before scale, diffusers has scale before shift: the halves of the rows change places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
import numpy as np

from latentrt.engines.spec import Array

# What the names of modules begin with, in one form or the other; no UNet has such names outside its blocks.
STARTS = (
    *("joint_blocks_", "transformer_blocks_", "x_embedder", "context_embedder", "t_embedder", "y_embedder"),
    *("final_layer_", "pos_embed", "time_text_embed", "norm_out", "proj_out"),
)
MODULES: Mapping[str, str] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
IN_BLOCKS: Mapping[str, str] = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
FUSED: Mapping[str, tuple[str, str, str]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")
LAST = "context_block.adaLN_modulation.1"  # in the last block, and in none before it, its halves change places
FINAL = "final_layer.adaLN_modulation.1"


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows of a change a weight has: those of `taken`, one after the other, of so many equal parts."""

    parts: int = 1
    taken: tuple[int, ...] = (0,)

    @property
    def whole(self) -> bool:
        """Tell whether it is all rows, in whichever order."""
        return self.parts == len(self.taken)

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what changes, of which a weight of a shape has its share."""
        return (weight[0] // len(self.taken) * self.parts, *weight[1:])

    def of(self, rows: Array) -> Array:
        """Return the share's rows."""
        if self.parts == 1:
            return rows
        split = np.split(rows, self.parts)
        return np.concatenate([split[part] for part in self.taken])


ALL, SWAPPED = Share(), Share(parts=2, taken=(1, 0))
THIRDS = tuple(Share(parts=3, taken=(part,)) for part in range(3))


def split_joint(module: str, *, blocks: int) -> dict[str, Share]:
    """Return diffusers' modules that one of the first authors' is, and which of its rows each has; any other is itself.

    blocks: how many the transformer has
    """
    if module == FINAL:
        return {"norm_out.linear": SWAPPED}
    found = BLOCK.fullmatch(module)
    if found is None:
        return {MODULES.get(module, module): ALL}
    inner, start = found[2], f"transformer_blocks.{found[1]}."
    if inner in FUSED:
        return {start + name: share for name, share in zip(FUSED[inner], THIRDS, strict=True)}
    share = SWAPPED if inner == LAST and int(found[1]) == blocks - 1 else ALL
    return {start + IN_BLOCKS.get(inner, inner): share}


def from_joint(module: str, *, blocks: int) -> dict[str, Share]:
    """Do the same for names with underscores in place of dots."""
    found = re.fullmatch(r"joint_blocks_(\d+)_(.+)", module)
    start, inner = (f"joint_blocks.{found[1]}.", found[2]) if found else ("", module)
    dotted = start + DOTTED.get(inner, inner)
    return {name.replace(".", "_"): share for name, share in split_joint(dotted, blocks=blocks).items()}


DOTTED: Mapping[str, str] = {name.replace(".", "_"): name for name in (*MODULES, *IN_BLOCKS, *FUSED, FINAL)}
