"""What a client of Triton sends and gets: each field of a request as a tensor, and how it is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import msgspec
import numpy as np
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.request import Control, Request
from latentrt.runtime.serve.options import Limits
from latentrt.runtime.serve.pictures import Format

DataType = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_INT64", "TYPE_FP64", "TYPE_FP32"]
T = TypeVar("T")


class Tensor(msgspec.Struct, frozen=True):
    """An input or output of the model. dims: as in config.pbtxt, where -1 is any number"""

    kind: DataType
    dims: tuple[int, ...] = (1,)

    def read(self, name: str, array: Array) -> Any:
        """Return what an array holds: one value of (1,), one or a list of (-1,), a tuple of (2,), else the array.

        Raises RequestError on text that is not UTF-8 and numbers that are not finite.
        """
        if len(self.dims) > 1:
            return array
        values = [_value(name, value) for value in array.ravel().tolist()]
        if self.dims == (2,):
            return tuple(values)
        if not values:
            raise RequestError(f"{name}: found no value, expected one at least; omit the tensor instead")
        return values[0] if len(values) == 1 else values


TEXT, TEXTS = Tensor("TYPE_STRING"), Tensor("TYPE_STRING", (-1,))
WHOLE, WHOLES, PAIR = Tensor("TYPE_INT64"), Tensor("TYPE_INT64", (-1,)), Tensor("TYPE_INT64", (2,))
NUMBER, NUMBERS, SPAN = Tensor("TYPE_FP64"), Tensor("TYPE_FP64", (-1,)), Tensor("TYPE_FP64", (2,))

FIELDS: Mapping[str, Tensor] = {  # of `Request`, by their own names
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "prompt_syntax": TEXT,
    "overflow": TEXT,
    "clip_skip": WHOLE,
    "n": WHOLE,
    "seed": WHOLES,
    "size": PAIR,
    "steps": WHOLE,
    "sampler": TEXT,
    "spacing": TEXT,
    "eta": NUMBER,
    "stop": NUMBER,
    "timesteps": NUMBERS,
    "sigmas": NUMBERS,
    "guidance": NUMBER,
    "guidance_interval": SPAN,
    "guidance_rescale": NUMBER,
    "image": TEXTS,
    "mask": TEXT,
    "strength": NUMBER,
    "latents": Tensor("TYPE_FP32", (-1, -1, -1, -1)),
    "variation_seed": WHOLE,
    "variation_strength": NUMBER,
    "original_size": PAIR,
    "target_size": PAIR,
    "crop": PAIR,
    "noise": TEXT,
    "decoder": TEXT,
    "refine_from": NUMBER,
    "aesthetic_score": NUMBER,
    "negative_aesthetic_score": NUMBER,
    "tile": WHOLE,
    "deadline": NUMBER,
}
CONTROLS: Mapping[str, Tensor] = {"control_name": TEXTS, "control_image": TEXTS, "control_scale": NUMBERS}
ANSWERS: Mapping[str, Tensor] = {  # how the pictures come
    "output_format": TEXT,
    "output_compression": WHOLE,
    "partial_images": WHOLE,
    "base64": Tensor("TYPE_BOOL"),
}
INPUTS: Mapping[str, Tensor] = {**FIELDS, **CONTROLS, **ANSWERS}
OUTPUTS: Mapping[str, Tensor] = {"image": TEXT, "info": TEXT}
NEEDED = "prompt"
FORMATS = ("PNG", "JPEG", "WEBP")  # pictures come as files of these
FILES = ("image", "mask", "control_image")  # bytes of picture files; all other strings are UTF-8
MOST_PARTIALS = 3


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What one call asks for.

    quality: 0 to 100, of jpeg and webp; partials: how many pictures to send of each while it is drawn, 0 to 3
    base64: send pictures as text, for JSON over HTTP
    """

    request: Request
    format: Format = "png"
    quality: int = 100
    partials: int = 0
    base64: bool = False


def read(array_of: Callable[[str], Array | None], limits: Limits) -> Asked:
    """Return what a call asks for, from its tensors by name. Raises RequestError, which begins with the name."""
    given = {name: tensor.read(name, array) for name, tensor in INPUTS.items() if (array := array_of(name)) is not None}
    fields = {name: value for name, value in given.items() if name in FIELDS}
    for name in ("timesteps", "sigmas"):
        if isinstance(fields.get(name), float):
            fields[name] = [fields[name]]
    asked = Asked(
        request=Request(**fields, controls=_controls(given)),
        format=_one_of("output_format", given.get("output_format", "png"), get_args(Format)),
        quality=_between("output_compression", given.get("output_compression", 100), 0, 100),
        partials=_between("partial_images", given.get("partial_images", 0), 0, MOST_PARTIALS),
        base64=given.get("base64", False),
    )
    _check(asked.request, limits)
    return asked


def looks(stages: int, partials: int) -> list[int]:
    """Return the stages, from 1, after which a picture is sent: evenly spread, the first before half of them."""
    return sorted({max(1, stages * (number + 1) // (partials + 1)) for number in range(partials)} - {stages})


def _value(name: str, value: Any) -> Any:
    if isinstance(value, bytes) and name not in FILES:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RequestError(f"{name}: found bytes that are not UTF-8, expected text") from None
    if isinstance(value, float) and not np.isfinite(value):
        raise RequestError(f"{name}: found {value}, expected a finite number")
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _controls(given: Mapping[str, Any]) -> tuple[Control, ...]:
    names, images = _listed(given.get("control_name")), _listed(given.get("control_image"))
    scales = _listed(given.get("control_scale")) or [1.0] * len(names)
    if not len(names) == len(images) == len(scales):
        raise RequestError(
            f"controls: found {len(names)} of control_name, {len(images)} of control_image and {len(scales)} of "
            "control_scale, expected one each for each control"
        )
    triples = zip(names, images, scales, strict=True)
    return tuple(Control(name=one, image=image, scale=scale) for one, image, scale in triples)


def _one_of(name: str, value: T, known: tuple[T, ...]) -> T:
    if value not in known:
        raise RequestError(f"{name}: found '{value}', expected one of {', '.join(map(str, known))}")
    return value


def _between(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{name}: found {value}, expected {least} to {most}")
    return value


def _check(request: Request, limits: Limits) -> None:
    """Raise RequestError on more than the limits allow, before any work is done."""
    prompts = 1 if isinstance(request.prompt, str) else len(request.prompt)
    _between("n", request.n, 1, limits.pictures // prompts)
    for name in ("steps", "timesteps", "sigmas"):
        value = getattr(request, name)
        steps = value if isinstance(value, int) else len(value or ())
        if steps > limits.steps:
            raise RequestError(f"{name}: found {steps}, expected at most {limits.steps}")
    if request.size is not None and request.size[0] * request.size[1] > limits.pixels:
        raise RequestError(f"size: found more than the {limits.pixels} pixels that may be drawn")
    controls = [control.image for control in request.controls]
    for name, files in (("image", request.image), ("mask", request.mask), ("controls", controls)):
        for file in _listed(files):
            _check_file(name, file, limits.pixels)


def _check_file(name: str, file: bytes, most: int) -> None:
    """Look at a picture file's header. Raise RequestError on other formats, and on more pixels than may be drawn."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RequestError(f"{name}: found far more than the {most} pixels that a picture may have") from None
    except Exception:  # each format's reader has errors of its own
        raise RequestError(f"{name}: found no picture, expected a file of {', '.join(FORMATS)}") from None
    if width * height > most:
        raise RequestError(f"{name}: found {width}x{height}, expected at most {most} pixels")
