"""What ControlNets add to a denoiser, by its config: how many residuals, how wide each is, and how small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from latentrt.engines.tensor_names import residual_names
from latentrt.export.configs.defaults import per_level

Config = Mapping[str, Any]
NONE = {"down_residuals": 0, "block_residuals": 0}  # where a checkpoint has no ControlNet


def unet_residuals(unet: Config, _: Sequence[Config]) -> dict[str, int]:
    """Return the dimensions of what ControlNets add to a UNet of a config."""
    channels = unet["block_out_channels"]
    return residual_dimensions(channels, per_level(unet["layers_per_block"], len(channels)))


def residual_dimensions(channels: Sequence[int], layers: Sequence[int]) -> dict[str, int]:
    """Return the dimensions of a UNet's residuals: how many there are, the channels of each, and how much smaller.

    channels, layers: of each level. After a level's layers its downsampler leaves one more, but at the last level.
    """
    rows = [(channels[0], 1)]
    for level, (width, depth) in enumerate(zip(channels, layers, strict=True)):
        rows += [(width, 2**level)] * depth
        if level < len(channels) - 1:
            rows.append((width, 2 ** (level + 1)))
    every = [*rows, (channels[-1], 2 ** (len(channels) - 1))]
    found = NONE | {"down_residuals": len(rows)}
    for name, (width, divisor) in zip(residual_names(len(rows)), every, strict=True):
        found |= {f"{name}_channels": width, f"{name}_divisor": divisor}
    return found


def transformer_residuals(transformer: Config, controlnets: Sequence[Config]) -> dict[str, int]:
    """Return the dimensions of what ControlNets add to a transformer: as wide as its patches.

    Block i of B takes residual int(i / (B / n)) of a ControlNet with n blocks. There are so many that each ControlNet
    has one or more for each of its own, and no more than B.
    """
    blocks = int(transformer["num_layers"])
    residuals = min(math.lcm(*(one["num_layers"] for one in controlnets)), blocks)
    patches = {"patch": transformer["patch_size"], "patch_width": transformer_width(transformer)}
    return {**NONE, "block_residuals": residuals, **patches}


def transformer_width(config: Config) -> int:
    """Return how wide the patches of a transformer, or of a ControlNet for one, are inside."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])
