"""A checkpoint with random weights in a real architecture's configuration: speed and memory need no trained one.

python benchmarks/random_checkpoint.py middle /tmp/middle
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.export.checkpoint import DEMO


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the three networks. `side` is of the latents; `width`, `layers` and `heads` are the text encoder's."""

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


# `middle` has SD 1.5's depth and attention at a fifth of its width; `sd15` is full size; `turbo` is SD 2.1's layout
# with SD-Turbo's schedule.
SHAPES = {
    "tiny": Shape(unet=(32, 64), unet_heads=4, vae=(16, 16), side=16, width=32, layers=2, heads=2),
    "middle": Shape(
        unet=(64, 128, 256, 256), unet_heads=8, vae=(32, 64, 128, 128), side=32, width=192, layers=6, heads=3
    ),
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    save_random(arguments.shape, arguments.directory)


def save_random(shape: str, directory: Path, *, half: bool = False) -> Path:
    """Write a diffusers directory with random weights, seed 0; `half` saves them in float16. Returns the directory."""
    import torch

    torch.manual_seed(0)
    sizes = SHAPES[shape]
    for folder, network in zip(("text_encoder", "unet", "vae"), make_networks(shape), strict=True):
        (network.half() if half else network).save_pretrained(directory / folder)
    for folder in ("tokenizer", "scheduler"):
        shutil.copytree(DEMO / folder, directory / folder, dirs_exist_ok=True)
    shutil.copyfile(DEMO / "model_index.json", directory / "model_index.json")
    scheduler = directory / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": sizes.spacing}, indent=1))
    return directory


def make_networks(shape: str) -> Iterator[Any]:
    """Make the text encoder, the UNet and the VAE with random weights, one at a time."""
    for make in (_text, _unet, _vae):
        yield make(SHAPES[shape])


def _text(sizes: Shape) -> Any:
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection_dim=sizes.width,
        hidden_act=sizes.activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def _unet(sizes: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    levels = len(sizes.unet)
    return UNet2DConditionModel(
        sample_size=sizes.side,
        block_out_channels=sizes.unet,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=sizes.width,
        attention_head_dim=sizes.unet_heads,
        use_linear_projection=sizes.linear,
    )


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
    )


if __name__ == "__main__":
    main()
