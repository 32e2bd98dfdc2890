"""What a client of Triton sends and gets: each field of a request as a tensor, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec
import numpy as np
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.request import Control, ImagePrompt, Lora, Request
from latentrt.runtime.serve.offered import lora_files
from latentrt.runtime.serve.options import Limits, ServeOptions
from latentrt.runtime.serve.pictures import Format, read_image
from latentrt.runtime.serve.web_errors import WebError

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
    "t5": Tensor("TYPE_BOOL"),
    "t5_tokens": WHOLE,
    "n": WHOLE,
    "seed": WHOLES,
    "size": PAIR,
    "steps": WHOLE,
    "sampler": TEXT,
    "spacing": TEXT,
    "eta": NUMBER,
    "shift": NUMBER,
    "stop": NUMBER,
    "timesteps": NUMBERS,
    "sigmas": NUMBERS,
    "forecast": WHOLE,
    "guidance": NUMBER,
    "guidance_interval": SPAN,
    "guidance_rescale": NUMBER,
    "skip_layer_guidance": NUMBER,
    "skip_layer_interval": SPAN,
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
LISTED: Mapping[str, Tensor] = {  # one for each control, for each image prompt, and for each LoRA
    "control_name": TEXTS,
    "control_image": TEXTS,
    "control_scale": NUMBERS,
    "image_prompt_name": TEXTS,
    "image_prompt_image": TEXTS,
    "image_prompt_scale": NUMBERS,
    "lora_name": TEXTS,
    "lora_scale": NUMBERS,
}
ANSWERS: Mapping[str, Tensor] = {  # how the pictures come
    "output_format": TEXT,
    "output_compression": WHOLE,
    "partial_images": WHOLE,
    "base64": Tensor("TYPE_BOOL"),
}
INPUTS: Mapping[str, Tensor] = {**FIELDS, **LISTED, **ANSWERS}
OUTPUTS: Mapping[str, Tensor] = {"image": TEXT, "info": TEXT}
NEEDED = "prompt"
FILES = ("image", "mask", "control_image", "image_prompt_image")  # bytes of picture files; all other strings are UTF-8
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


def read(array_of: Callable[[str], Array | None], options: ServeOptions) -> Asked:
    """Return what a call asks for, from its tensors by name. Raises RequestError, which begins with the name."""
    limits = options.limits
    given = {name: tensor.read(name, array) for name, tensor in INPUTS.items() if (array := array_of(name)) is not None}
    fields = {name: value for name, value in given.items() if name in FIELDS}
    for name in ("timesteps", "sigmas"):
        if isinstance(fields.get(name), float):
            fields[name] = [fields[name]]
    for name in fields.keys() & {"image", "mask"}:
        pictures = [_picture(name, file, limits) for file in _listed(fields[name])]
        fields[name] = pictures if len(pictures) > 1 else pictures[0]
    asked = Asked(
        request=Request(
            **fields,
            controls=_controls(given, limits),
            image_prompts=_image_prompts(given, limits),
            loras=_loras(given, options),
        ),
        format=_one_of("output_format", given.get("output_format", "png"), get_args(Format)),
        quality=_between("output_compression", given.get("output_compression", 100), 0, 100),
        partials=_between("partial_images", given.get("partial_images", 0), 0, MOST_PARTIALS),
        base64=given.get("base64", False),
    )
    _check(asked.request, limits)
    return asked


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


def _picture(name: str, file: bytes, limits: Limits) -> Image.Image:
    try:
        return read_image(file, name=name, most=limits.pixels)
    except WebError as error:
        raise RequestError(str(error)) from None


def _rows(given: Mapping[str, Any], what: str, names: str, *others: str) -> list[tuple[Any, ...]]:
    """Return what belongs together of tensors that hold one for each; scales may be missing. Raises RequestError."""
    columns = [_listed(given.get(name)) for name in (names, *others)]
    columns[-1] = columns[-1] or [1.0] * len(columns[0])
    if len(set(map(len, columns))) > 1:
        words = ", ".join(f"{len(column)} of {name}" for name, column in zip((names, *others), columns, strict=True))
        raise RequestError(f"{what}: found {words}; give as many of each")
    return list(zip(*columns, strict=True))


def _controls(given: Mapping[str, Any], limits: Limits) -> tuple[Control, ...]:
    rows = _rows(given, "controls", "control_name", "control_image", "control_scale")
    return tuple(
        Control(name=name, image=_picture("control_image", file, limits), scale=scale) for name, file, scale in rows
    )


def _image_prompts(given: Mapping[str, Any], limits: Limits) -> tuple[ImagePrompt, ...]:
    names = ("image_prompt_name", "image_prompt_image", "image_prompt_scale")
    return tuple(
        ImagePrompt(name=name, image=_picture(names[1], file, limits), scale=scale)
        for name, file, scale in _rows(given, "image_prompts", *names)
    )


def _loras(given: Mapping[str, Any], options: ServeOptions) -> tuple[Lora, ...]:
    rows = _rows(given, "loras", "lora_name", "lora_scale")
    known = lora_files(options) if rows else {}
    return tuple(Lora(file=_known(name, known), scale=scale) for name, scale in rows)


def _known(name: str, files: Mapping[str, Path]) -> Path:
    if name not in files:
        raise RequestError(f"lora_name: there is no '{name}'; there are: {', '.join(files) or 'none'}")
    return files[name]


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
