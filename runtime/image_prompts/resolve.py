"""What image prompts ask for, checked against a bundle: their images as CLIP sees them, and each layer's scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import ImagePromptSpec, Manifest
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.request import ImagePrompt, ImageScale

# What diffusers calls a UNet's blocks where it takes a scale for each of them.
BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


class ResolvedImage(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An image prompt that can be drawn.

    images: (pictures, side, side, 3), uint8, as the encoder sees them before they are normalised
    scale: (layers,), float32
    """

    spec: ImagePromptSpec
    images: Array
    scale: Array


def resolve_images(prompts: Sequence[ImagePrompt], manifest: Manifest, *, pictures: int) -> tuple[ResolvedImage, ...]:
    """Check image prompts against a bundle, and read their images. Raises RequestError."""
    if not isinstance(prompts, list | tuple) or not all(isinstance(one, ImagePrompt) for one in prompts):
        raise RequestError(f"image_prompts: found {prompts!r}, expected a list of ImagePrompt(name=…, image=…)")
    names = [prompt.name for prompt in prompts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"image_prompts: found '{twice}' twice, expected one image for each IP-Adapter")
    return tuple(_resolve(prompt, manifest, pictures) for prompt in prompts)


def _resolve(prompt: ImagePrompt, manifest: Manifest, pictures: int) -> ResolvedImage:
    where, taken = f"image_prompts, '{prompt.name}'", manifest.denoisers[manifest.denoiser]
    spec = next((spec for spec in taken.image_prompts if spec.name == prompt.name), None)
    if spec is None:
        held = ", ".join(spec.name for spec in taken.image_prompts)
        fix = f"it holds {held}" if held else "export it again with --ip-adapter NAME=PATH"
        raise RequestError(f"{where}: this bundle holds no IP-Adapter of that name; {fix}")
    from latentrt.runtime.images.clip import read_for_clip  # with Pillow

    side = manifest.components[spec.encoder].inputs[0].shape[-1]
    assert isinstance(side, int)
    images = read_for_clip(prompt.image, side=side, name=where)
    if len(images) not in (1, pictures):
        raise RequestError(
            f"{where}: found {len(images)} images for {pictures} pictures, expected one, or one for each"
        )
    images = np.broadcast_to(images, (pictures, *images.shape[1:]))
    return ResolvedImage(spec=spec, images=images, scale=layer_scales(prompt.scale, taken.image_layers, where=where))


def layer_scales(scale: ImageScale, layers: Sequence[str], *, where: str) -> Array:
    """Return how strongly each layer attends to an image: (layers,), float32. Raises RequestError.

    scale: see `ImagePrompt`; layers: their names; where: the request's field, for the error
    """
    if isinstance(scale, Mapping):
        named = sorted(_named(scale, "", layers, where), key=lambda pair: len(pair[0]))
        found = np.zeros(len(layers), dtype=np.float32)
        for name, number in named:  # what is named more closely comes last
            found[[_within(layer, name) for layer in layers]] = number
        return found
    if isinstance(scale, list | tuple):
        if len(scale) != len(layers):
            raise RequestError(f"{where}: found {len(scale)} scales, expected one for each of {len(layers)} layers")
        return np.array([_number(one, where) for one in scale], dtype=np.float32)
    return np.full(len(layers), _number(scale, where), dtype=np.float32)


def _named(scale: Any, start: str, layers: Sequence[str], where: str) -> Iterator[tuple[str, float]]:
    """Yield the names of blocks, as the checkpoint has them, with their scales."""
    if isinstance(scale, Mapping):
        for key, inner in scale.items():
            block = re.fullmatch(r"block_(\d+)", str(key))
            word = block[1] if block else BLOCKS.get(str(key), str(key))
            name = f"{start}.{word}" if start else word
            if not any(_within(layer, name) for layer in layers):
                there = ", ".join(dict.fromkeys(layer.partition(".attentions.")[0] for layer in layers))
                raise RequestError(f"{where}: no layer of '{name}' attends to images, expected some of {there}")
            yield from _named(inner, name, layers, where)
    elif isinstance(scale, list | tuple):
        parts = dict.fromkeys(
            layer.removeprefix(f"{start}.attentions.").partition(".")[0] for layer in layers if _within(layer, start)
        )
        if len(scale) not in (1, len(parts)):
            raise RequestError(f"{where}: found {len(scale)} scales for {start}, expected one or {len(parts)}")
        for part, number in zip(parts, list(scale) * (len(parts) if len(scale) == 1 else 1), strict=True):
            yield f"{start}.attentions.{part}", _number(number, where)
    else:
        yield start, _number(scale, where)


def _within(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise RequestError(f"{where}: found the scale {value!r}, expected a number")
    return float(value)
