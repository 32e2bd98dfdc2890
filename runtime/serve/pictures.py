"""Pictures on their way to a client: PNG, JPEG or WebP, with what they were drawn with."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentrt.engines.spec import Array
from latentrt.runtime.images.write_png import parameters
from latentrt.runtime.result import Result

Format = Literal["png", "jpeg", "webp"]
USER_COMMENT = 0x9286  # of EXIF, where tools look for a JPEG's or WebP's settings


def encode(result: Result, kind: Format, *, quality: int = 100) -> bytes:
    """Return the first picture of a result as a file's bytes, with its settings. quality: 0 to 100, of jpeg and webp"""
    return encode_pixels(result.pixels[0], kind, quality=quality, text=parameters(result.settings[0], result.seeds[0]))


def encode_pixels(pixels: Array, kind: Format, *, quality: int = 100, text: str | None = None) -> bytes:
    """Return a picture as a file's bytes.

    pixels: (height, width, 3), uint8, sRGB; text: the settings, written where the community's tools look for them
    """
    image, file = Image.fromarray(pixels), io.BytesIO()
    if kind == "png":
        info = PngInfo()
        if text is not None:
            info.add_itxt("parameters", text)
        image.save(file, "PNG", pnginfo=info, compress_level=1)
    else:
        exif = Image.Exif()
        if text is not None:
            exif.get_ifd(0x8769)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        image.save(file, kind.upper(), quality=quality, exif=exif)
    return file.getvalue()
