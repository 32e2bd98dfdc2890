"""SD 3 as its first authors' files have it, made from diffusers directories: written backwards from the names there.

The product reads the layout with diffusers' conversion; this is the opposite direction, written independently of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.single_files import vae_tensors

OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
INSIDE = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
THREE = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
}
TEXTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def joint_tensors(state: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return the tensors of diffusers' SD3Transformer2DModel under the first authors' names."""
    import torch

    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    found: dict[str, Any] = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", module)
        if block is None:
            name = OUTSIDE.get(key) or f"{OUTSIDE[module]}.{parameter}"
            swapped = module == "norm_out.linear"
        else:
            name = f"joint_blocks.{block[1]}.{INSIDE.get(block[2])}.{parameter}"
            swapped = int(block[1]) == blocks - 1 and block[2] == "norm1_context.linear"
            three = next(
                (old for old in THREE if re.fullmatch(re.escape(old).replace(r"\{\}", "[qkv]"), block[2])), None
            )
            if three:
                start, names = f"transformer_blocks.{block[1]}.", [three.format(letter) for letter in "qkv"]
                name = f"joint_blocks.{block[1]}.{THREE[three]}.{parameter}"
                tensor = torch.cat([state[f"{start}{one}.{parameter}"] for one in names])
        found[prefix + name] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    return found


def checkpoint_tensors(directory: Path, *, texts: tuple[str, ...] = tuple(TEXTS)) -> dict[str, Any]:
    """Return a diffusers directory's tensors as they are in a single file. texts: the text encoders that it holds"""
    from safetensors.torch import load_file

    def read(folder: str) -> dict[str, Any]:
        (file,) = (directory / folder).glob("*.safetensors")
        return load_file(file)

    config = json.loads((directory / "vae" / "config.json").read_text())
    found = joint_tensors(read("transformer"), prefix="model.diffusion_model.")
    found |= vae_tensors(read("vae"), config, prefix="first_stage_model.")
    for name in texts:
        if (directory / name).is_dir():
            found |= {f"text_encoders.{TEXTS[name]}.transformer.{key}": tensor for key, tensor in read(name).items()}
    return found


def save_sd3_file(directory: Path, path: Path, *, texts: tuple[str, ...] = tuple(TEXTS)) -> Path:
    """Write a diffusers directory as one file. Returns the file."""
    from safetensors.torch import save_file

    save_file({key: one.contiguous().clone() for key, one in checkpoint_tensors(directory, texts=texts).items()}, path)
    return path


def make_square_sd3(directory: Path, *, dual: bool = False) -> Path:
    """Save a tiny SD 3 with T5, whose first text encoder projects to itself, as those from files do."""
    from unittest import mock

    import torch
    from safetensors.torch import load_file, save_file

    from tests import sd3

    first, second = sd3.CLIPS
    clips = ({**first, "projection_dim": first["hidden_size"]}, second)
    pooled = {"pooled_projection_dim": first["hidden_size"] + second["projection_dim"]}
    with mock.patch.multiple(sd3, CLIPS=clips, TRANSFORMER={**sd3.TRANSFORMER, **pooled}):
        sd3.make_sd3(directory, t5=True, dual=dual)
    file = directory / "text_encoder" / "model.safetensors"
    tensors = load_file(file) | {"text_projection.weight": torch.eye(first["hidden_size"])}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory
