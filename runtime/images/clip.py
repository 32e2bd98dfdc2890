"""Pictures as CLIP's vision models see them.

IP-Adapters show them as transformers' CLIPImageProcessor prepares them by default, videos of an image as diffusers'
StableVideoDiffusionPipeline does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentrt.engines.spec import Array
from latentrt.runtime.images.read import decode_opaque, listed
from latentrt.runtime.images.sources import ImageSource

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def read_for_clip(sources: ImageSource | Sequence[ImageSource], *, side: int, name: str) -> Array:
    """Return the middle of pictures, a square of `side` pixels: (n, side, side, 3), uint8.

    sources: as `read_pictures` takes them. Each is resized with a bicubic filter until its short side is `side`, then
    cut. Raises RequestError on what cannot be decoded.
    """
    return np.stack([_middle(decode_opaque(source, name=name), side) for source in listed(sources, name)])


def _middle(picture: Image.Image, side: int) -> Array:
    short = min(picture.size)
    width, height = (int(side * edge / short) for edge in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def normalise(pictures: Array) -> Array:
    """Return what CLIP's vision models take: (n, 3, side, side), float32. pictures: (n, side, side, 3), uint8"""
    return _normalised(pictures.astype(np.float32) / np.float32(255))


def _normalised(values: Array) -> Array:
    return np.ascontiguousarray(((values - MEAN) / DEVIATION).transpose(0, 3, 1, 2))


def read_whole_for_clip(sources: ImageSource | Sequence[ImageSource], *, side: int, name: str) -> Array:
    """Return whole pictures as CLIP's vision models take them: (n, 3, side, side), float32.

    sources: as `read_pictures` takes them. Each is smoothed as far as it is made smaller, and resized without regard
    to its proportions. Raises RequestError on what cannot be decoded.
    """
    pictures = [np.asarray(decode_opaque(source, name=name)) for source in listed(sources, name)]
    return _normalised(np.stack([_smoothly(picture / 255, side) for picture in pictures]).astype(np.float32))


def _smoothly(picture: Array, side: int) -> Array:
    """Return a picture resized: (side, side, 3), float64. picture: (height, width, 3)"""
    down, across = (_resizing(length, side) for length in picture.shape[:2])
    return np.asarray(np.einsum("ih,hwc,jw->ijc", down, picture, across, optimize=True))


def _resizing(length: int, side: int) -> Array:
    """Return what resizes one axis, a matrix of (side, length): a Gaussian, then cubic convolution from end to end.

    diffusers' _resize_with_antialiasing: the deviation is half of what the factor is above 1
    """
    deviation = max((length / side - 1) / 2, 0.001)
    taps = int(max(4 * deviation, 3)) // 2
    offsets = np.arange(-taps, taps + 1)
    gauss = np.exp(-(offsets**2) / (2 * deviation**2))
    at = np.arange(side) * ((length - 1) / (side - 1))
    first, matrix = np.floor(at).astype(int), np.zeros((side, length))
    for near in (-1, 0, 1, 2):
        says, centre = _cubic(np.abs(at - first - near)), np.clip(first + near, 0, length - 1)
        for offset, share in zip(offsets, gauss / gauss.sum(), strict=True):
            np.add.at(matrix, (np.arange(side), _reflected(centre + offset, length)), says * share)
    return matrix


def _cubic(distance: Array, a: float = -0.75) -> Array:
    """Return the weight of what is so far away, 0 to 2: that of torch's bicubic interpolation."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.asarray(np.where(distance <= 1, near, far))


def _reflected(places: Array, length: int) -> Array:
    """Return places beyond either end turned back, the end itself not repeated."""
    if length == 1:
        return np.zeros_like(places)
    turn = 2 * (length - 1)
    inside = np.abs(places) % turn
    return np.asarray(np.minimum(inside, turn - inside))
