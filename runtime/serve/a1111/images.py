"""Images as clients of A1111's API send them: base64 of a file, or a data URL. No other URL is read."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from latentrt.runtime.serve.web_errors import WebError

FORMATS = ("PNG", "JPEG", "WEBP")


def read_image(text: str, field: str, *, pixels: int) -> bytes:
    """Return the file that a field holds. Raises WebError on what is no picture, or one of too many pixels.

    pixels: what its header may say that it has, before anything is decoded
    """
    head, comma, rest = text.partition(",")
    if head.lower().startswith(("http://", "https://")):
        raise WebError(f"{field}: no URL is fetched; send the file itself as base64", param=field)
    try:
        file = base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WebError(f"{field}: this is not base64", param=field) from error
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises whatever its parsers meet
        raise WebError(f"{field}: this is not a PNG, JPEG or WebP that can be read", param=field) from error
    if width * height > pixels:
        raise WebError(f"{field}: {width}x{height} is more than the {pixels} pixels that may be sent", param=field)
    return file
