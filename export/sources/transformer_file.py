"""The MMDiT of SD 3 and 3.5 in a single file: its config, from the names and shapes of its weights alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from latentrt.engines.bundle.safetensors_header import StoredTensor, TensorFile
from latentrt.export.configs.families import DENOISER_PREFIX

FIRST = "x_embedder.proj.weight"
BLOCK = re.compile(r"joint_blocks\.(\d+)\.")
HEAD = 64  # the width of a head where no norm of queries tells it


def transformer_config(file: TensorFile) -> dict[str, Any] | None:
    """Return the config of the transformer in a whole checkpoint's file, None if it holds none of this kind."""
    tensors = {
        key.removeprefix(DENOISER_PREFIX): stored
        for key, stored in file.tensors.items()
        if key.startswith(DENOISER_PREFIX)
    }
    blocks = {int(found[1]) for key in tensors if (found := BLOCK.match(key))}
    needed = (FIRST, "context_embedder.weight", "y_embedder.mlp.0.weight", "final_layer.linear.weight", "pos_embed")
    if not blocks or not all(key in tensors for key in needed) or len(tensors[FIRST].shape) != 4:
        return None
    return _config(tensors, layers=max(blocks) + 1)


def _config(tensors: Mapping[str, StoredTensor], *, layers: int) -> dict[str, Any]:
    width, channels, patch, _ = tensors[FIRST].shape
    norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm.shape[0] if norm else HEAD
    return {
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "patch_size": patch,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "caption_projection_dim": width,
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(tensors["pos_embed"].shape[1]),
        "qk_norm": "rms_norm" if norm else None,
        "dual_attention_layers": [
            layer for layer in range(layers) if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in tensors
        ],
    }
