"""Checkpoints in one file, made from diffusers directories: the first Stable Diffusion's layout, written backwards.

The names are those of CompVis' and Stability's repositories. The product reads the layout with diffusers' conversion;
this is the opposite direction, written independently of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _replace(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = re.sub(rf"(^|(?<=\.)){re.escape(old)}(?=\.|$)", new, key)
    return key


def unet_key(key: str, *, layers: int, attended: Iterable[int]) -> str:
    """Return the original key of a weight of diffusers' UNet.

    layers: resnets of a down block; attended: the up blocks with attention
    """
    key = _replace(key, UNET)
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", key):
        block, kind, place, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        number = (layers + 1) * block + place + 1
        key = f"input_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", key):
        block, kind, place, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * block + layers}.{2 if block in attended else 1}.{rest}"
        key = f"output_blocks.{(layers + 1) * block + place}.{0 if kind == 'resnets' else 1}.{rest}"
    return _replace(key, RESNET) if "transformer_blocks" not in key else key


def unet_tensors(unet: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a UNet's tensors as they are in a single file."""
    attended = [number for number, kind in enumerate(config["up_block_types"]) if "Attn" in kind]
    layers = config["layers_per_block"]
    return {
        f"model.diffusion_model.{unet_key(key, layers=layers, attended=attended)}": tensor
        for key, tensor in unet.items()
    }


def vae_key(key: str, *, levels: int) -> str:
    """Return the original key of a weight of diffusers' VAE with this many levels."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    if "mid_block.attentions" in key:
        key = _replace(key.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def vae_tensors(vae: Mapping[str, Any], config: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    """Return a VAE's tensors as they are in a single file; its attention was made of 1x1 convolutions."""
    levels = len(config["block_out_channels"])
    found = {prefix + vae_key(key, levels=levels): tensor for key, tensor in vae.items()}
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in found.items()
    }


def clip_tensors(text: Mapping[str, Any], *, prefix: str = "cond_stage_model.transformer.") -> dict[str, Any]:
    """Return the tensors of SD 1.x's text encoder as they are in a single file."""
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}


def open_clip_tensors(text: Mapping[str, Any], *, prefix: str = "cond_stage_model.model.") -> dict[str, Any]:
    """Return the tensors of SD 2.x's text encoder as they are in a single file: Q, K and V in one matrix.

    A last layer is added, which the published files hold and nothing uses.
    """
    import torch

    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    found = {}
    for key, tensor in text.items():
        if match := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", key):
            parts = [text[f"{match[1]}.self_attn.{letter}_proj.{match[2]}"] for letter in "qkv"]
            found[f"{_replace(match[1], OPEN_CLIP)}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", key) and "position_ids" not in key:
            found[_replace(key, OPEN_CLIP)] = tensor
    width = text["final_layer_norm.weight"].shape[0]
    projection = found.pop("text_projection.weight", torch.zeros(width, width))
    found |= {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
    return {prefix + key: tensor for key, tensor in found.items()}


def checkpoint_tensors(directory: Path) -> dict[str, Any]:
    """Return all tensors of a diffusers directory as they are in a single file, with what training leaves there."""
    import torch
    from safetensors.torch import load_file

    def read(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
        (file,) = (directory / folder).glob("*.safetensors")
        return load_file(file), json.loads((directory / folder / "config.json").read_text())

    if not (directory / "text_encoder_2").is_dir():
        text, config = read("text_encoder")
        texts = clip_tensors(text) if config["hidden_act"] == "quick_gelu" else open_clip_tensors(text)
    elif (directory / "text_encoder").is_dir():
        texts = clip_tensors(read("text_encoder")[0], prefix="conditioner.embedders.0.transformer.")
        texts |= open_clip_tensors(read("text_encoder_2")[0], prefix="conditioner.embedders.1.model.")
    else:
        texts = open_clip_tensors(read("text_encoder_2")[0], prefix="conditioner.embedders.0.model.")
    return {
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "betas": torch.linspace(0, 1, 1000),
        **texts,
        **vae_tensors(*read("vae"), prefix="first_stage_model."),
        **unet_tensors(*read("unet")),
    }


def save_single_file(
    directory: Path, path: Path, *, metadata: Mapping[str, str] | None = None, marks: Mapping[str, Any] | None = None
) -> Path:
    """Write a diffusers directory as one file. marks: the numbers of further tensors. Returns the file."""
    import torch
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in checkpoint_tensors(directory).items()}
    tensors |= {key: torch.tensor(numbers) for key, numbers in (marks or {}).items()}
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def save_header(
    path: Path,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    marks: Mapping[str, list[float]] | None = None,
) -> Path:
    """Write a file of the right length with a header and no data: a model of any size that takes no room.

    tensors: shapes, or anything with a shape, by key; all become float16. marks: further tensors, with their numbers
    """
    import numpy as np

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    written = {key: np.array(numbers, np.float16) for key, numbers in (marks or {}).items()}
    for key, tensor in {**written, **tensors}.items():
        shape = list(getattr(tensor, "shape", tensor))
        size = 2
        for side in shape:
            size *= side
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in written.values()))
        file.truncate(8 + len(text) + end)
    return path
