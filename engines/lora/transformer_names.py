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
    "x_embedder_proj": "pos_embed_proj",
    "t_embedder_mlp_0": "time_text_embed_timestep_embedder_linear_1",
    "t_embedder_mlp_2": "time_text_embed_timestep_embedder_linear_2",
    "y_embedder_mlp_0": "time_text_embed_text_embedder_linear_1",
    "y_embedder_mlp_2": "time_text_embed_text_embedder_linear_2",
    "final_layer_linear": "proj_out",
}
IN_BLOCKS: Mapping[str, str] = {
    "x_block_attn_proj": "attn_to_out_0",
    "x_block_attn_ln_q": "attn_norm_q",
    "x_block_attn_ln_k": "attn_norm_k",
    "x_block_attn2_proj": "attn2_to_out_0",
    "x_block_attn2_ln_q": "attn2_norm_q",
    "x_block_attn2_ln_k": "attn2_norm_k",
    "x_block_mlp_fc1": "ff_net_0_proj",
    "x_block_mlp_fc2": "ff_net_2",
    "x_block_adaLN_modulation_1": "norm1_linear",
    "context_block_attn_proj": "attn_to_add_out",
    "context_block_attn_ln_q": "attn_norm_added_q",
    "context_block_attn_ln_k": "attn_norm_added_k",
    "context_block_mlp_fc1": "ff_context_net_0_proj",
    "context_block_mlp_fc2": "ff_context_net_2",
    "context_block_adaLN_modulation_1": "norm1_context_linear",
}
FUSED: Mapping[str, tuple[str, str, str]] = {
    "x_block_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "x_block_attn2_qkv": ("attn2_to_q", "attn2_to_k", "attn2_to_v"),
    "context_block_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
}
BLOCK = re.compile(r"joint_blocks_(\d+)_(.+)")
LAST = "context_block_adaLN_modulation_1"  # in the last block, and in none before it, its halves change places
FINAL = "final_layer_adaLN_modulation_1"


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


def from_joint(module: str, *, blocks: int) -> dict[str, Share]:
    """Return diffusers' modules that one of the first authors' is, and which of its rows each has; any other is itself.

    blocks: how many the transformer has
    """
    if module == FINAL:
        return {"norm_out_linear": SWAPPED}
    found = BLOCK.fullmatch(module)
    if found is None:
        return {MODULES.get(module, module): ALL}
    inner, start = found[2], f"transformer_blocks_{found[1]}_"
    if inner in FUSED:
        return {start + name: share for name, share in zip(FUSED[inner], THIRDS, strict=True)}
    share = SWAPPED if inner == LAST and int(found[1]) == blocks - 1 else ALL
    return {start + IN_BLOCKS.get(inner, inner): share}
