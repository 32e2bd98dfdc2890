"""A checkpoint with random weights in a real architecture's configuration: speed and memory need no trained one.

python benchmarks/random_checkpoint.py middle /tmp/middle
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from random_sd3 import SHAPES as SD3
from random_sd3 import save_sd3
from random_weights import make_clip, save_network

from latentrt.export.checkpoint import DEMO


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the networks. `side` is of the latents; `width`, `layers` and `heads` are the text encoder's.

    second: width, layers and heads of the second text encoder, which SDXL has
    options: of the UNet's config, over what the sizes say
    """

    unet: tuple[int, ...]
    unet_heads: int | tuple[int, ...]
    vae: tuple[int, ...]
    side: int
    width: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    linear: bool = False
    spacing: str = "leading"
    second: tuple[int, int, int] | None = None
    scaling: float = 0.18215
    options: Mapping[str, Any] = field(default_factory=dict)


# What the UNet of stabilityai/stable-diffusion-xl-base-1.0 has of its own.
XL: Mapping[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# `middle` has SD 1.5's depth and attention at a fifth of its width; `sd15` and `sdxl` are full size; `vae` is SD 1.5's
# VAE with the UNet of `tiny`; `turbo` is SD 2.1's layout with SD-Turbo's schedule.
SHAPES = {
    "tiny": Shape(unet=(32, 64), unet_heads=4, vae=(16, 16), side=16, width=32, layers=2, heads=2),
    "middle": Shape(
        unet=(64, 128, 256, 256), unet_heads=8, vae=(32, 64, 128, 128), side=32, width=192, layers=6, heads=3
    ),
    "vae": Shape(unet=(32, 64), unet_heads=4, vae=(128, 256, 512, 512), side=64, width=32, layers=2, heads=2),
    "sd15": Shape(
        unet=(320, 640, 1280, 1280), unet_heads=8, vae=(128, 256, 512, 512), side=64, width=768, layers=12, heads=12
    ),
    "turbo": Shape(
        unet=(320, 640, 1280, 1280),
        unet_heads=(5, 10, 20, 20),
        vae=(128, 256, 512, 512),
        side=64,
        width=1024,
        layers=23,
        heads=16,
        activation="gelu",
        linear=True,
        spacing="trailing",
    ),
    "sdxl": Shape(
        unet=(320, 640, 1280),
        unet_heads=(5, 10, 20),
        vae=(128, 256, 512, 512),
        side=128,
        width=768,
        layers=12,
        heads=12,
        linear=True,
        second=(1280, 32, 20),
        scaling=0.13025,
        options=XL,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=[*SHAPES, *SD3])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    save_random(arguments.shape, arguments.directory)


def save_random(shape: str, directory: Path, *, half: bool = False, hollow: bool = False) -> Path:
    """Write a diffusers directory with random weights, seed 0; `half` saves them in float16. Returns the directory.

    One tensor at a time: it takes no more memory than the largest.
    hollow: as in `save_sd3`
    """
    import torch

    if shape in SD3:
        return save_sd3(shape, directory, half=half, hollow=hollow)
    sizes = SHAPES[shape]
    generator = None if hollow else np.random.default_rng(0)
    with torch.device("meta"):
        for folder, network in zip(folders(sizes), make_networks(shape), strict=True):
            save_network(network, directory / folder, generator, half=half)
    tokenizers = {"tokenizer_2": "tokenizer"} if sizes.second else {}
    for folder, source in {"tokenizer": "tokenizer", "scheduler": "scheduler", **tokenizers}.items():
        shutil.copytree(DEMO / source, directory / folder, dirs_exist_ok=True)
    index = json.loads((DEMO / "model_index.json").read_text()) | (_xl_index() if sizes.second else {})
    (directory / "model_index.json").write_text(json.dumps(index, indent=1))
    scheduler = directory / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": sizes.spacing}, indent=1))
    return directory


def _xl_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def folders(sizes: Shape) -> tuple[str, ...]:
    """Return the folders of a shape's networks, in the order in which they are made."""
    return ("text_encoder", "unet", "vae", *(("text_encoder_2",) if sizes.second else ()))


def make_networks(shape: str) -> Iterator[Any]:
    """Make the text encoder, the UNet, the VAE and the second text encoder, if any, with torch's random weights."""
    sizes = SHAPES[shape]
    yield make_clip(sizes.width, sizes.layers, sizes.heads, sizes.activation)
    yield _unet(sizes)
    yield _vae(sizes)
    if sizes.second:
        yield make_clip(*sizes.second, "gelu", projected=True)


def _unet(sizes: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    levels = len(sizes.unet)
    config: dict[str, Any] = {
        "sample_size": sizes.side,
        "block_out_channels": sizes.unet,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "cross_attention_dim": sizes.width,
        "attention_head_dim": sizes.unet_heads,
        "use_linear_projection": sizes.linear,
    }
    return UNet2DConditionModel(**config | dict(sizes.options))


def _vae(sizes: Shape) -> Any:
    from diffusers import AutoencoderKL

    levels = len(sizes.vae)
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, sizes.vae[0]),
        sample_size=sizes.side * 2 ** (levels - 1),
        scaling_factor=sizes.scaling,
    )


if __name__ == "__main__":
    main()
