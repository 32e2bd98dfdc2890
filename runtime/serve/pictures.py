"""Pictures on their way from and to a client: PNG, JPEG or WebP."""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from typing import Literal

import numpy as np
from PIL import Image

from latentrt.engines.spec import Array
from latentrt.runtime.images.jpeg_parts import is_endless
from latentrt.runtime.images.read import decode
from latentrt.runtime.images.write_png import encode_png, parameters
from latentrt.runtime.result import Result
from latentrt.runtime.serve.web_errors import WebError

Format = Literal["png", "jpeg", "webp"]
READ = ("PNG", "JPEG", "WEBP")  # what a client may send
USER_COMMENT = 0x9286  # of EXIF, where tools look for a JPEG's or WebP's settings
MOST_TEXT = 65_000  # bytes of settings in a JPEG, whose EXIF has two for its length


def encode(result: Result, kind: Format, *, quality: int = 100) -> bytes:
    """Return the first picture of a result as a file's bytes, with its settings. quality: 0 to 100, of jpeg and webp"""
    return encode_pixels(result.pixels[0], kind, quality=quality, text=parameters(result.settings[0], result.seeds[0]))


def encode_pixels(pixels: Array, kind: Format, *, quality: int = 100, text: str | None = None) -> bytes:
    """Return a picture as a file's bytes.

    pixels: (height, width, 3), uint8, sRGB; text: the settings, written where the community's tools look for them;
        left out of a JPEG that has no room for them
    """
    image, file = Image.fromarray(pixels), io.BytesIO()
    if kind == "png":
        encode_png(image, file, text)
    else:
        exif = Image.Exif()
        comment = b"" if text is None else b"UNICODE\0" + text.encode("utf-16-be")
        if comment and (kind == "webp" or len(comment) <= MOST_TEXT):
            exif.get_ifd(0x8769)[USER_COMMENT] = comment
        image.save(file, kind.upper(), quality=quality, exif=exif)
    return file.getvalue()


def read_image(data: bytes, *, name: str, most: int) -> Image.Image:
    """Return a picture that a client sent, decoded, upright and in 8 bits; its size is known before its pixels are.

    name: the field that it came in; most: pixels that it may have
    Raises WebError, 400, in our own words: a library's may tell what is none of a client's business.
    """
    if is_endless(data):
        raise _unreadable(name, "it has more segments or scans than any picture")
    try:
        image = Image.open(io.BytesIO(data), formats=READ)
        width, height = image.size
    except Exception:  # each format's reader has errors of its own
        raise _unreadable(name, f"it is none of {', '.join(READ)}, or its beginning is damaged") from None
    if width * height > most:
        raise WebError(
            f"{name}: it has {width}x{height} pixels, more than the {most} that may be sent",
            code="image_too_large",
            param=name,
        )
    try:
        upright = decode(image, name=name)
    except Exception:
        raise _unreadable(name, "it is truncated or damaged") from None
    assert isinstance(upright, Image.Image)
    return upright


def _unreadable(name: str, why: str) -> WebError:
    return WebError(f"{name}: the file cannot be read: {why}", code="invalid_image", param=name)


def mask_of_alpha(mask: Image.Image) -> Image.Image:
    """Return a mask that is white where it is repainted, of one that is transparent there, as OpenAI's are.

    One without any transparency is returned as it is: it is taken to be white and black already.
    """
    if not mask.has_transparency_data:
        return mask
    alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    if alpha.min() == 255:
        return mask.convert("RGB")
    return Image.fromarray(np.where(alpha < 128, np.uint8(255), np.uint8(0)))


def grown(pixels: Array, size: tuple[int, int]) -> Array:
    """Return a small picture at (width, height): (height, width, 3), uint8."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def shown(count: int, stages: int) -> Collection[int]:
    """Return the stages, of so many, after which a partial image is shown: spread, the first before half of them.

    There are fewer than `count` where there are not so many stages before the last.
    """
    spread = (max(number, math.floor(0.8 * stages * number / (count + 1))) for number in range(1, count + 1))
    return {stage for stage in spread if stage < stages}
