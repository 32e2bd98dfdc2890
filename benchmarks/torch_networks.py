"""The denoisers of the suite's models in torch: the plain UNet, and diffusers' transformer of SD 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from plain_unet import SHAPES, UNet
from random_sd3 import MEDIUM, TRANSFORMER
from torch import nn

TRANSFORMERS = {"sd35": {**TRANSFORMER, **MEDIUM}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a denoiser takes: latents' channels, the text's tokens and width, the pooled text's width (0 for none)."""

    channels: int
    tokens: int
    width: int
    pooled: int


class Transformer(nn.Module):
    """sample (n, 16, h, w), timestep (n,), encoder_hidden_states (n, tokens, width), pooled (n, pooled)."""

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers import SD3Transformer2DModel

        super().__init__()
        self.inner = SD3Transformer2DModel(**config)

    def forward(self, sample: Any, timestep: Any, text: Any, pooled: Any) -> Any:
        return self.inner(sample, text, pooled, timestep, return_dict=False)[0]


def sizes_of(shape: str) -> Sizes:
    """Return what a denoiser takes."""
    if shape in TRANSFORMERS:
        config = TRANSFORMERS[shape]
        return Sizes(
            channels=config["in_channels"],
            tokens=77 + 256,  # CLIP's and T5's
            width=config["joint_attention_dim"],
            pooled=config["pooled_projection_dim"],
        )
    return Sizes(channels=4, tokens=77, width=SHAPES[shape].context, pooled=SHAPES[shape].pooled)


def make_denoiser(shape: str) -> nn.Module:
    """Return a denoiser with torch's own random weights, on the current device."""
    return Transformer(TRANSFORMERS[shape]) if shape in TRANSFORMERS else UNet(SHAPES[shape])


def pass_flops(shape: str, side: int) -> int:
    """Count the floating-point operations of one pass for one row, latents of side x side: two for each product.

    Counted by torch on the meta device: no memory, no arithmetic.
    """
    from torch.utils.flop_counter import FlopCounterMode

    sizes = sizes_of(shape)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        sample, text = torch.empty(1, sizes.channels, side, side), torch.empty(1, sizes.tokens, sizes.width)
        pooled = torch.empty(1, sizes.pooled) if sizes.pooled else None
        make_denoiser(shape)(sample, torch.empty(1), text, pooled)
    return int(counter.get_total_flops())
