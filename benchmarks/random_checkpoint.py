"""A checkpoint with random weights in a real architecture's configuration: speed and memory need no trained one.

python benchmarks/random_checkpoint.py middle /tmp/middle
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from latentrt.export.checkpoint import DEMO

# SD 1.5's layout. `middle` has its depth and attention at a quarter of its width; `sd15` is full size.
SHAPES: dict[str, dict[str, Any]] = {
    "middle": {"unet": (64, 128, 256, 256), "vae": (32, 64, 128, 128), "width": 192, "layers": 6, "heads": 3},
    "sd15": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "width": 768, "layers": 12, "heads": 12},
}
PICTURE = {"middle": 32, "sd15": 64}  # latents a side


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
    for folder, model in (("text_encoder", _text), ("unet", _unet), ("vae", _vae)):
        network = model(sizes, PICTURE[shape])
        (network.half() if half else network).save_pretrained(directory / folder)
        del network
    for folder in ("tokenizer", "scheduler"):
        shutil.copytree(DEMO / folder, directory / folder, dirs_exist_ok=True)
    shutil.copyfile(DEMO / "model_index.json", directory / "model_index.json")
    return directory


def _text(sizes: dict[str, Any], side: int) -> Any:
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=sizes["width"],
        intermediate_size=4 * sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        projection_dim=sizes["width"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def _unet(sizes: dict[str, Any], side: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side, block_out_channels=sizes["unet"], cross_attention_dim=sizes["width"], attention_head_dim=8
    )


def _vae(sizes: dict[str, Any], side: int) -> Any:
    from diffusers import AutoencoderKL

    levels = len(sizes["vae"])
    return AutoencoderKL(
        block_out_channels=sizes["vae"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=8 * side,
    )


if __name__ == "__main__":
    main()
