"""Images as clients of A1111's API send them, and its masks: what a mask means, and the edge that it leaves."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from latentrt.runtime.images.read import decode
from latentrt.runtime.serve.a1111.schema import Img2Img
from latentrt.runtime.serve.pictures import encode_pixels
from latentrt.runtime.serve.web_errors import WebError

MOST_BLUR = 64  # pixels, as in A1111's interface
OPAQUE = 128  # alpha above which a mask repaints


def file_of(text: str, field: str) -> bytes:
    """Return the file that a field holds: base64, or a data URL; no other URL is read. Raises WebError."""
    head, comma, rest = text.partition(",")
    if head.lower().startswith(("http://", "https://")):
        raise WebError(f"{field}: no URL is fetched; send the file itself as base64", param=field)
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise WebError(f"{field}: this is not base64", param=field) from None


def blur_of(body: Img2Img) -> tuple[float, float]:
    """Return how far a mask's edge is blurred across and down, in pixels. Raises WebError."""
    given = (body.mask_blur or 0.0, body.mask_blur or 0.0)
    blur = given if any(given) else (body.mask_blur_x or 0.0, body.mask_blur_y or 0.0)
    if not all(0 <= one <= MOST_BLUR for one in blur):
        raise WebError(f"mask_blur: found {max(blur):g}, expected 0 to {MOST_BLUR}", param="mask_blur")
    return blur


def mask_of(image: Image.Image, *, inverted: bool, blur: tuple[float, float]) -> Image.Image:
    """Return a mask as A1111's interface reads it: grey, white where it repaints.

    image: white on black; or with transparency, and then opaque is white
    blur: the deviations across and down, in pixels
    """
    grey = image.convert("L")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            grey = alpha.point([255 if value > OPAQUE else 0 for value in range(256)])
    grey = ImageOps.invert(grey) if inverted else grey
    return grey.filter(ImageFilter.GaussianBlur(blur)) if any(blur) else grey


def blended(file: bytes, image: Image.Image, mask: Image.Image) -> bytes:
    """Return a PNG with an image where a mask is black, and a mixture where it is grey; its settings stay."""
    drawn = Image.open(io.BytesIO(file))
    upright = decode(image, name="init_images")
    assert isinstance(upright, Image.Image)
    kept = upright.convert("RGB").resize(drawn.size, Image.Resampling.LANCZOS)
    mixed = Image.composite(drawn, kept, mask.resize(drawn.size, Image.Resampling.LANCZOS))
    return encode_pixels(np.asarray(mixed), "png", text=str(drawn.info["parameters"]))
