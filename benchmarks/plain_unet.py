"""The UNets of SD 1.5, SD 2.1/Turbo and SDXL in plain torch, with diffusers' names for the weights.

A peer for machines that have torch but no diffusers, and the count of arithmetic behind every floor: the same
operations as diffusers' `UNet2DConditionModel` (tests/test_gpu_suite.py compares outputs and names).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

SKIPS = 2  # resnets on each level of the way down


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetShape:
    """A UNet's sizes. A level's depth is its number of transformer blocks, 0 for none.

    pooled: width of what SDXL adds to the timestep: the pooled text with six sizes; 0 if there is none
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    context: int
    linear: bool
    pooled: int = 0


SHAPES = {
    "tiny": UNetShape(channels=(32, 64), depths=(1, 0), heads=(4, 4), context=32, linear=False),
    "sd15": UNetShape(
        channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context=768, linear=False
    ),
    "turbo": UNetShape(
        channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), heads=(5, 10, 20, 20), context=1024, linear=True
    ),
    "sdxl": UNetShape(
        channels=(320, 640, 1280), depths=(0, 2, 10), heads=(5, 10, 20), context=2048, linear=True, pooled=2816
    ),
}


class UNet(nn.Module):
    """sample (n, 4, h, w), timestep (n,), encoder_hidden_states (n, tokens, context), pooled (n, pooled) or None."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        first, width = shape.channels[0], 4 * shape.channels[0]
        self.shape = shape
        self.conv_in = nn.Conv2d(4, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, width)
        if shape.pooled:
            self.add_embedding = TimeEmbedding(shape.pooled, width)
        self.down_blocks = nn.ModuleList(self._down(i, width) for i in range(len(shape.channels)))
        depth = next(depth for depth in reversed(shape.depths) if depth)
        self.mid_block = Middle(shape.channels[-1], width, shape.heads[-1], depth, shape)
        self.up_blocks = nn.ModuleList(self._up(i, width) for i in range(len(shape.channels)))
        self.conv_norm_out = nn.GroupNorm(32, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, 4, 3, padding=1)

    def _down(self, level: int, width: int) -> Level:
        shape = self.shape
        into = shape.channels[max(level - 1, 0)]
        pairs = [(into if j == 0 else shape.channels[level], shape.channels[level]) for j in range(SKIPS)]
        last = level == len(shape.channels) - 1
        return Level(pairs, width, level, shape, down=not last, up=False)

    def _up(self, index: int, width: int) -> Level:
        channels = self.shape.channels
        level = len(channels) - 1 - index
        below = channels[min(level + 1, len(channels) - 1)]
        above = channels[max(level - 1, 0)]
        skips = [channels[level]] * SKIPS + [above]
        froms = [below] + [channels[level]] * SKIPS
        pairs = [(a + b, channels[level]) for a, b in zip(froms, skips, strict=True)]
        return Level(pairs, width, level, self.shape, down=False, up=level > 0)

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, pooled: Any = None) -> Any:
        time = self.time_embedding(wave(timestep, self.shape.channels[0]).to(sample.dtype))
        if self.shape.pooled:
            time = time + self.add_embedding(pooled)
        x = self.conv_in(sample)
        skips = [x]
        for level in self.down_blocks:
            for resnet, attention in level.pairs():
                x = attention(resnet(x, time), encoder_hidden_states)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, encoder_hidden_states)
        for level in self.up_blocks:
            for resnet, attention in level.pairs():
                x = attention(resnet(torch.cat([x, skips.pop()], dim=1), time), encoder_hidden_states)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


def wave(timestep: Any, width: int) -> Any:
    """Return the timestep as cosines and sines: (n, width), float32."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(into, width), nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        return self.linear_2(functional.silu(self.linear_1(x)))


class Sampler(nn.Module):
    """The convolution that halves the picture, or the one after doubling it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Any) -> Any:
        return self.conv(x)


class Level(nn.Module):
    """Resnets and, on most levels, a transformer after each; then a change of size."""

    def __init__(
        self, pairs: list[tuple[int, int]], width: int, level: int, shape: UNetShape, *, down: bool, up: bool
    ) -> None:
        super().__init__()
        out, depth = shape.channels[level], shape.depths[level]
        self.resnets = nn.ModuleList(Resnet(into, to, width) for into, to in pairs)
        if depth:
            self.attentions = nn.ModuleList(Transformer(out, shape.heads[level], depth, shape) for _ in pairs)
        if down:
            self.downsamplers = nn.ModuleList([Sampler(out, 2)])
        if up:
            self.upsamplers = nn.ModuleList([Sampler(out, 1)])

    def pairs(self) -> Any:
        nothing = [lambda x, _: x] * len(self.resnets)
        return zip(self.resnets, getattr(self, "attentions", nothing), strict=True)


class Middle(nn.Module):
    def __init__(self, channels: int, width: int, heads: int, depth: int, shape: UNetShape) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(channels, heads, depth, shape)])

    def forward(self, x: Any, time: Any, context: Any) -> Any:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class Resnet(nn.Module):
    def __init__(self, into: int, out: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, into, eps=1e-5), nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, out)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-5), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.conv_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: Any, time: Any) -> Any:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Transformer(nn.Module):
    def __init__(self, channels: int, heads: int, depth: int, shape: UNetShape) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        project = nn.Linear if shape.linear else _pointwise
        self.proj_in, self.proj_out = project(channels, channels), project(channels, channels)
        self.transformer_blocks = nn.ModuleList(Block(channels, heads, shape.context) for _ in range(depth))
        self._linear = shape.linear

    def forward(self, x: Any, context: Any) -> Any:
        n, c, h, w = x.shape
        y = self.norm(x)
        if not self._linear:
            y = self.proj_in(y)
        y = y.permute(0, 2, 3, 1).reshape(n, h * w, c)
        if self._linear:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, context)
        if self._linear:
            y = self.proj_out(y)
        y = y.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return x + (y if self._linear else self.proj_out(y))


def _pointwise(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Any, context: Any) -> Any:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self._heads = heads

    def forward(self, x: Any, context: Any) -> Any:
        q, k, v = (self._split(part) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).reshape(x.shape))

    def _split(self, x: Any) -> Any:
        return x.reshape(x.shape[0], x.shape[1], self._heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gated(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Any) -> Any:
        return self.net[2](self.net[0](x))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Any) -> Any:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)
