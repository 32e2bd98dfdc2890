"""What a body of the Images API asks of the runtime."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from latentrt.runtime.request import Control, ImagePrompt, Lora, Request
from latentrt.runtime.serve.offered import check_engines, lora_files
from latentrt.runtime.serve.openai.schema import Drawing, Edit, SentControl, SentImagePrompt
from latentrt.runtime.serve.options import Limits, ServeOptions
from latentrt.runtime.serve.pictures import mask_of_alpha, read_image
from latentrt.runtime.serve.web_errors import WebError

if TYPE_CHECKING:
    from PIL import Image

    from latentrt.runtime.serve.models import Model

Sent = TypeVar("Sent", SentControl, SentImagePrompt)
Files = Mapping[str, list[bytes]]
MADE = frozenset(
    {"prompt", "n", "size", "loras", "controls", "image_prompts", "image", "mask"}
)  # in both, but not alike
OWN = [name for name in Request.__struct_fields__ if name in Drawing.__struct_fields__ and name not in MADE]
STEPS = {"low": 10, "high": 30, "hd": 30, "xhigh": 40, "max": 50}  # of a quality, where a request names no steps
IMAGES, MASK = ("image", "image[]"), "mask"
FILES_OF = {name: f"{name}[][image]" for name in ("controls", "image_prompts")}
# What would be another picture, had it an effect: what the field is asked for, and what to do.
OTHERS: Mapping[str, tuple[object, str]] = {
    "background": ("transparent", "pictures here are opaque; omit it"),
    "input_fidelity": ("high", "how much of the image is kept is `strength`'s to say; omit it"),
    "style": (..., "this service has no styles; describe it in the prompt and omit this field"),
    "complexity": (..., "nothing plans a picture here; omit it"),
    "frame_count": (..., "this service draws single pictures; omit it"),
    "frame_duration_ms": (..., "this service draws single pictures; omit it"),
}


def request_of(body: Drawing, files: Files, model: Model, options: ServeOptions) -> Request:
    """Return the request of a body and the files beside it. Raises WebError, before any work is done.

    It decodes images, which takes longer than an event loop has.
    """
    limits = options.limits
    refuse_others(body, options)
    count = 1 if body.n is None else body.n
    if not 1 <= count <= limits.pictures:
        raise WebError(f"n: found {count}, expected 1 to {limits.pictures}", param="n")
    own = {name: value for name in OWN if (value := getattr(body, name)) is not None}
    own |= _steps(body, limits)
    size = size_of(body.size, limits)
    if size is not None:
        check_engines(size, model)
    return Request(
        prompt=body.prompt,
        n=count,
        size=size,
        loras=_loras(body, options),
        controls=_controls(body, files, limits),
        image_prompts=_image_prompts(body, files, limits),
        **own,
        **(_images(files, limits) if isinstance(body, Edit) else {}),
    )


def refuse_others(body: Drawing, options: ServeOptions) -> None:
    """Refuse what cannot be had here. Raises WebError."""
    for name, (unknown, advice) in OTHERS.items():
        value = getattr(body, name, None)
        if value is not None and unknown in (value, ...):
            raise WebError(f"{name}: found '{value}': {advice}", code="unsupported_value", param=name)
    if body.response_format == "url" and (options.pictures is None or body.stream):
        what = "a stream holds its pictures" if body.stream else "this service keeps no pictures"
        raise WebError(f"response_format: {what}; ask for b64_json", code="unsupported_value", param="response_format")


def _steps(body: Drawing, limits: Limits) -> dict[str, int]:
    for name in ("timesteps", "sigmas"):
        if len(getattr(body, name) or ()) > limits.steps + 1:
            raise WebError(f"{name}: found more than the {limits.steps} steps that may be taken", param=name)
    if body.steps is not None and not 1 <= body.steps <= limits.steps:
        raise WebError(f"steps: found {body.steps}, expected 1 to {limits.steps}", param="steps")
    by_quality = STEPS.get(body.quality or "")
    free = body.steps is None and body.timesteps is None and body.sigmas is None
    return {"steps": by_quality} if free and by_quality is not None else {}


def quality_of(body: Drawing) -> str:
    """Return the quality that a picture is drawn with: what was asked for, unless the steps were named themselves."""
    free = body.steps is None and body.timesteps is None and body.sigmas is None
    return body.quality if free and body.quality is not None else "auto"


def size_of(text: str | None, limits: Limits) -> tuple[int, int] | None:
    """Return width and height of `512x768`; None for the model's own, for which `auto` stands too. Raises WebError."""
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, flags=re.ASCII)
    if found is None:
        raise WebError(f"size: found '{text}', expected WIDTHxHEIGHT in pixels, as in 512x768, or auto", param="size")
    width, height = int(found[1]), int(found[2])
    if width * height > limits.pixels:
        raise WebError(f"size: {text} is more than the {limits.pixels} pixels that may be drawn", param="size")
    return width, height


def _loras(body: Drawing, options: ServeOptions) -> tuple[Lora, ...]:
    if not body.loras:
        return ()
    known = lora_files(options)
    for lora in body.loras:
        if lora.name not in known:
            there = f"there are: {', '.join(known)}" if known else "this service has none"
            raise WebError(f"loras: there is no '{lora.name}'; {there}", code="lora_not_found", param="loras")
    return tuple(Lora(file=known[lora.name], scale=lora.scale) for lora in body.loras)


def _controls(body: Drawing, files: Files, limits: Limits) -> tuple[Control, ...]:
    return tuple(
        Control(name=one.name, image=image, scale=one.scale, start=one.start, stop=one.stop)
        for one, image in _with_images("controls", body.controls or [], files, limits)
    )


def _image_prompts(body: Drawing, files: Files, limits: Limits) -> tuple[ImagePrompt, ...]:
    return tuple(
        ImagePrompt(name=one.name, image=image, scale=one.scale)
        for one, image in _with_images("image_prompts", body.image_prompts or [], files, limits)
    )


def _with_images(what: str, sent: Sequence[Sent], files: Files, limits: Limits) -> list[tuple[Sent, Image.Image]]:
    """Return what was sent with its image each: of a form's files, where it has some, they are in its order."""
    data = files.get(FILES_OF[what])
    if data is None:
        data = [_decoded(what, one) for one in sent]
    if len(data) != len(sent):
        raise WebError(f"{what}: found {len(data)} images for {len(sent)} names", param=what)
    return [(one, read_image(image, name=what, most=limits.pixels)) for one, image in zip(sent, data, strict=True)]


def _decoded(what: str, one: SentControl | SentImagePrompt) -> bytes:
    if one.image is None:
        raise WebError(f"{what}: '{one.name}' has no image", param=what)
    try:
        return base64.b64decode(one.image, validate=True)
    except (binascii.Error, ValueError):
        raise WebError(f"{what}: the image of '{one.name}' is not base64", param=what) from None


def _images(files: Files, limits: Limits) -> dict[str, Any]:
    """Return the images and the mask of an edit."""
    if unknown := next((name for name in files if name not in (*IMAGES, MASK, *FILES_OF.values())), None):
        raise WebError(f"{unknown}: no file of that name is read here", code="unknown_parameter", param=unknown)
    data = [one for name in IMAGES for one in files.get(name, [])]
    if not data:
        raise WebError("image: it is missing; send a file", code="missing_required_parameter", param="image")
    images = [read_image(one, name="image", most=limits.pixels) for one in data]
    masks = [mask_of_alpha(read_image(one, name=MASK, most=limits.pixels)) for one in files.get(MASK, [])]
    if len(masks) > 1:
        raise WebError(f"mask: found {len(masks)}, expected one", param=MASK)
    return {"image": images[0] if len(images) == 1 else images, "mask": masks[0] if masks else None}
