"""Pictures as CLIP's vision models see them, as transformers' CLIPImageProcessor prepares them by default."""

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
    values = (pictures.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
