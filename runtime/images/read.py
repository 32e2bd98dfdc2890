"""Pictures and masks that come in: from a file, its bytes, Pillow or an array, to what the networks take.

Resizing and scaling are those of diffusers' VaeImageProcessor, bit for bit. What it takes silently and then
misreads (transparency, 16 bits, arrays of bytes, an orientation in EXIF) is converted here, or refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, ImageOps

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.images.sources import MAX_PIXELS, ImageSource

# Formats whose decoders read pixels and nothing else: EPS, for one, is a program that Pillow hands to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow converts these to 8 bits by clipping at 255
WHITE = (255, 255, 255, 255)
ROUNDING = 1e-3  # by which floats may leave 0 to 1: another library's resizing overshoots


def read_pictures(
    sources: ImageSource | Sequence[ImageSource], *, factor: int, size: tuple[int, int] | None = None
) -> Array:
    """Return what the VAE encoder takes: (n, height, width, 3), float32, -1 to 1.

    sources: one, a list of them, or an array (n, h, w, c). The first frame of an animation is taken; transparency
        becomes white; grey becomes RGB
    size: (width, height), multiples of the factor; None for the first picture's own, rounded down to such
    A picture of another size is resized with Lanczos' filter, without regard to its proportions; an array of floats
    is not resized, but refused.
    Raises RequestError on what cannot be decoded or has more than MAX_PIXELS.
    """
    pictures = [decode(source, name="image") for source in listed(sources, "image")]
    size = size or rounded_size(size_of(pictures[0]), factor, name="image")
    return np.stack([_signed(_fitted(picture, size, "image")) for picture in pictures])


def read_hints(sources: ImageSource | Sequence[ImageSource], *, size: tuple[int, int], name: str) -> Array:
    """Return what ControlNets follow: (n, height, width, 3), float32, 0 to 1. Otherwise as `read_pictures`."""
    return np.stack([_fitted(decode(source, name=name), size, name) for source in listed(sources, name)])


def decode_opaque(source: ImageSource, *, name: str) -> Image.Image:
    """Return a picture in RGB, before white where it is transparent; floats are rounded to 8 bits. As `decode`."""
    picture = decode(source, name=name)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.broadcast_to(_bytes(picture), (*picture.shape[:2], 3)).copy())
    return _opaque(picture)


def first_of(sources: ImageSource | Sequence[ImageSource], *, name: str) -> Image.Image | Array:
    """Return the first of some pictures, decoded. Raises RequestError."""
    return decode(listed(sources, name)[0], name=name)


def read_mask(mask: ImageSource, *, size: tuple[int, int], picture_size: tuple[int, int]) -> Array:
    """Return a mask at the size of the picture to draw: (1, height, width), float32, 1 where it is repainted, else 0.

    mask: white (from half up) is repainted, black is kept
    size: (width, height) to draw, to which the mask is resized with Lanczos' filter before it is cut at a half
    picture_size: (width, height) of the picture that it masks, before any resizing
    Raises RequestError on what cannot be decoded, a mask of another size than the picture, one with transparency, and
    one that is all black: nothing would be drawn, so it is probably an inverted or an empty layer.
    """
    decoded = decode(mask, name="mask")
    if size_of(decoded) != picture_size:
        raise RequestError(
            f"mask: found {_sides(size_of(decoded))}, expected {_sides(picture_size)} as the image has; "
            "resize it to the image"
        )
    cut = (_grey(decoded, size) >= 0.5).astype(np.float32)
    if not cut.any():
        raise RequestError("mask: it is black all over, so nothing would be repainted; paint white what should change")
    return cut[None]


def decode(source: ImageSource, *, name: str) -> Image.Image | Array:
    """Return a picture upright, in 8 bits: a Pillow image of any other mode, or an array (h, w, c), float32, 0 to 1.

    Raises RequestError, which begins with `name`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _upright(source, "the Pillow image", name)
    if isinstance(source, bytes | bytearray | memoryview):
        what = f"the data of {len(source)} bytes"
        return _upright(_open(io.BytesIO(source), what, name), what, name)
    if not isinstance(source, str | os.PathLike):
        raise RequestError(
            f"{name}: found {type(source).__name__}, expected a path, the bytes of a file, a Pillow image or an array"
        )
    with _file(source, name) as file:
        return _upright(_open(file, f"'{source}'", name), f"'{source}'", name)


def size_of(picture: Image.Image | Array) -> tuple[int, int]:
    """Return (width, height) of what `decode` gave."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def rounded_size(size: tuple[int, int], factor: int, *, name: str = "image") -> tuple[int, int]:
    """Return (width, height) rounded down to multiples of the VAE's factor. Raises RequestError if none is left."""
    width, height = (side - side % factor for side in size)
    if not width or not height:
        raise RequestError(f"{name}: found {_sides(size)}, expected at least {factor} pixels a side")
    return width, height


def listed(sources: ImageSource | Sequence[ImageSource], name: str) -> list[ImageSource]:
    """Return pictures one by one, of a list, an array of four axes, or one. Raises RequestError where there is none."""
    many = isinstance(sources, list | tuple) or (isinstance(sources, np.ndarray) and sources.ndim == 4)
    listed = cast("list[ImageSource]", list(sources) if many else [sources])  # type: ignore[arg-type]
    if not listed:
        raise RequestError(f"{name}: found none, expected at least one")
    return listed


def _file(path: str | os.PathLike[str], name: str) -> io.BufferedReader:
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{name}: '{path}' cannot be read ({reason}); check the path") from None


def _open(file: IO[bytes], what: str, name: str) -> Image.Image:
    """Read a file's header: nothing is decoded yet."""
    Image.init()
    try:
        return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the caller's own, lower limit
        raise RequestError(f"{name}: {what} has too many pixels ({error}); give a smaller one") from None
    except Exception:  # each format's reader has errors of its own: struct.error, SyntaxError, KeyError, ..
        raise RequestError(
            f"{name}: {what} cannot be decoded: it is none of {', '.join(FORMATS)}, or its beginning is damaged"
        ) from None


def _upright(image: Image.Image, what: str, name: str) -> Image.Image:
    """Decode after looking at the size, turn as EXIF says, and bring to 8 bits."""
    _check_size(image.size, what, name)
    try:
        return _eight_bits(ImageOps.exif_transpose(image), what, name)
    except RequestError:
        raise
    except Exception as error:  # as above; a truncated file is an OSError, a bad profile a ValueError
        raise RequestError(
            f"{name}: {what} cannot be decoded: it is truncated or damaged ({error}); save or copy it again"
        ) from None


def _check_size(size: tuple[int, int], what: str, name: str) -> None:
    if min(size) < 1:
        raise RequestError(f"{name}: {what} is {_sides(size)}, expected at least one pixel a side")
    if size[0] * size[1] > MAX_PIXELS:
        raise RequestError(f"{name}: {what} is {_sides(size)}, more than {MAX_PIXELS} pixels; give a smaller one")


def _eight_bits(image: Image.Image, what: str, name: str) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise RequestError(
                f"{name}: {what} has values from {values.min()} to {values.max()}, expected 16 bits at most"
            )
        return Image.fromarray(_bytes(values / 0xFFFF))
    if image.mode == "F":
        return Image.fromarray(_bytes(_unit(np.asarray(image), what, name)))
    image.load()
    return image


def _bytes(values: Array) -> Array:
    return np.asarray(np.rint(np.clip(values, 0, 1) * 255), dtype=np.uint8)


def _unit(values: Array, what: str, name: str) -> Array:
    """Return floats that are from 0 to 1."""
    if not np.isfinite(values).all():
        raise RequestError(f"{name}: {what} holds a number that is not finite")
    if values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
        raise RequestError(
            f"{name}: {what} has values from {values.min():g} to {values.max():g}, expected floats from 0 to 1; "
            "scale them, or give uint8 from 0 to 255"
        )
    return np.asarray(values, dtype=np.float32)


def _from_array(array: Array, name: str) -> Image.Image | Array:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise RequestError(f"{name}: found an array of shape {array.shape}, expected (height, width, 3)")
    _check_size((array.shape[1], array.shape[0]), "the array", name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * np.uint8(255))
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(f"{name}: found an array of {array.dtype}, expected uint8, or floats from 0 to 1")
    if array.ndim == 3 and array.shape[2] == 4:
        raise RequestError(f"{name}: found floats with transparency, expected three channels; give uint8 for four")
    return np.atleast_3d(_unit(array, "the array", name))


def _fitted(picture: Image.Image | Array, size: tuple[int, int], name: str) -> Array:
    """Return RGB at this size: (height, width, 3), float32, 0 to 1."""
    if isinstance(picture, Image.Image):
        resized = _opaque(picture).resize(size, Image.Resampling.LANCZOS)
        return np.array(resized).astype(np.float32) / np.float32(255)
    return np.broadcast_to(_as_it_is(picture, size, name), (size[1], size[0], 3))


def _signed(values: Array) -> Array:
    return np.float32(2) * values - np.float32(1)


def _opaque(image: Image.Image) -> Image.Image:
    """Return RGB, before white where the picture is transparent: as it looks on a page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    upper = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", upper.size, WHITE), upper).convert("RGB")


def _grey(mask: Image.Image | Array, size: tuple[int, int]) -> Array:
    """Return how white a mask is: (height, width), float32, 0 to 1. As diffusers, it is resized, then made grey."""
    if not isinstance(mask, Image.Image):
        if mask.shape[2] != 1:
            raise RequestError(f"mask: found {mask.shape[2]} channels of floats, expected (height, width)")
        return _as_it_is(mask, size, "mask")[..., 0]
    if mask.has_transparency_data:
        alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:  # some tools mean by it what is repainted, some what is kept
            raise RequestError("mask: it has transparency, expected white on black; save it without")
        mask = mask.convert("RGB")
    return np.array(mask.resize(size, Image.Resampling.LANCZOS).convert("L")).astype(np.float32) / np.float32(255)


def _as_it_is(array: Array, size: tuple[int, int], name: str) -> Array:
    if size_of(array) != size:
        raise RequestError(
            f"{name}: found an array of floats of {_sides(size_of(array))}, expected {_sides(size)}; "
            "resize it, or give uint8, which is resized here"
        )
    return array


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
