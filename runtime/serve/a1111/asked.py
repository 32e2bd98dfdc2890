"""What a body of A1111's API asks of the runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from PIL import Image

from latentrt.runtime.request import Request
from latentrt.runtime.sampling.catalogue import SAMPLERS, choose_sampler, find
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.serve.a1111.images import blur_of, file_of, mask_of
from latentrt.runtime.serve.a1111.neutral import refuse_further, refuse_unless_neutral
from latentrt.runtime.serve.a1111.prompts import take_loras
from latentrt.runtime.serve.a1111.schema import DEFAULT_CFG, DEFAULT_STRENGTH, RANDOM, Drawing, Img2Img
from latentrt.runtime.serve.a1111.settings import Settings
from latentrt.runtime.serve.bodies import invalid
from latentrt.runtime.serve.models import Model
from latentrt.runtime.serve.offered import check_engines, lora_files
from latentrt.runtime.serve.options import Limits, ServeOptions
from latentrt.runtime.serve.pictures import read_image
from latentrt.runtime.serve.web_errors import WebError

T = TypeVar("T", bound=msgspec.Struct)
# A1111's schedulers that have another name here. Both of the first leave it to the sampler's name.
SPACINGS: Mapping[str, str | None] = {"automatic": None, "uniform": None, "align_your_steps": "ays"}
ORIGINAL = 1  # inpainting_fill: what a mask repaints begins with the image


def parse(fields: dict[str, Any], kind: type[T]) -> T:
    """Return the fields of a body. Raises WebError on a value of the wrong type, and on what is not offered."""
    names = kind.__struct_encode_fields__
    try:
        body = msgspec.convert({name: value for name, value in fields.items() if name in names}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    refuse_further({name: value for name, value in fields.items() if name not in names})
    return body


def request_of(body: Drawing, settings: Settings, model: Model, options: ServeOptions) -> Request:
    """Return the request of a body. Raises WebError and RequestError on what cannot be drawn, before it is tried.

    settings: with the body's own options. It decodes images, which takes longer than an event loop has.
    """
    limits = options.limits
    refuse_unless_neutral("enable_hr", body.enable_hr)
    prompt, applied = take_loras(body.prompt or "", lora_files(options), apply=not body.disable_extra_networks)
    size = _size(body, limits)
    if size is not None:
        check_engines(size, model)
    return Request(
        prompt=prompt,
        negative_prompt=body.negative_prompt or None,
        prompt_syntax="weighted",
        clip_skip=settings.clip_stop - 1,
        n=_count(body, limits),
        guidance=DEFAULT_CFG if body.cfg_scale is None else body.cfg_scale,
        size=size,
        steps=_steps(body, limits),
        noise=settings.noise,
        loras=applied,
        **_sampler(body, model),
        **_seeds(body),
        **(_image(body, limits) if isinstance(body, Img2Img) else {}),
    )


def _count(body: Drawing, limits: Limits) -> int:
    batch, times = (1 if one is None else one for one in (body.batch_size, body.n_iter))
    if batch < 1 or times < 1 or batch * times > limits.pictures:
        raise WebError(
            f"batch_size: found {batch}, {times} times, expected 1 to {limits.pictures} pictures", param="batch_size"
        )
    return batch * times


def _steps(body: Drawing, limits: Limits) -> int | None:
    if body.steps is not None and not 1 <= body.steps <= limits.steps:
        raise WebError(f"steps: found {body.steps}, expected 1 to {limits.steps}", param="steps")
    return body.steps


def _size(body: Drawing, limits: Limits) -> tuple[int, int] | None:
    if body.width is None or body.height is None:
        if body.width != body.height:
            raise WebError("width: it and height belong together; give both or neither", param="width")
        return None
    if body.width * body.height > limits.pixels:
        raise WebError(
            f"width: {body.width}x{body.height} is more than the {limits.pixels} pixels that may be drawn",
            param="width",
        )
    return body.width, body.height


def _seeds(body: Drawing) -> dict[str, Any]:
    seed, subseed = (None if one == RANDOM else one for one in (body.seed, body.subseed))
    if not body.subseed_strength:
        return {"seed": seed}
    # The library wants a seed where it has a strength, and takes any number.
    varied = int.from_bytes(os.urandom(4)) if subseed is None else subseed
    return {"seed": seed, "variation_seed": varied, "variation_strength": body.subseed_strength}


def _sampler(body: Drawing, model: Model) -> dict[str, Any]:
    """Return sampler, spacing and eta. A spacing in the sampler's name goes before the scheduler, as in A1111's."""
    name, scheduler = body.sampler_name or body.sampler_index, (body.scheduler or "").lower().replace(" ", "_")
    spacing = SPACINGS.get(scheduler, scheduler) or None
    if name is not None and find(name).spacing is not None:
        spacing = None
    return {"sampler": name, "spacing": spacing, "eta": _eta(body.eta, name, model)}


def _eta(eta: float | None, sampler: str | None, model: Model) -> float | None:
    """Return the share of fresh noise, where the sampler has a choice; None where it has not, and eta is its share."""
    manifest, schedule = model.pipe.manifest, model.pipe.manifest.schedule
    chosen = choose_sampler(sampler, schedule).name
    if eta is None or SAMPLERS[chosen].eta is not None:
        return eta
    tokens = manifest.latents.tokens(manifest.default_size)
    if eta == 1 or not make_plan(sampler, schedule, steps=4, tokens=tokens).uses_noise.any():
        return None
    raise WebError(f"eta: {chosen} has no choice of how much noise it adds; omit it", param="eta")


def _image(body: Img2Img, limits: Limits) -> dict[str, Any]:
    """Return image, mask and strength."""
    if not body.init_images:
        raise WebError("init_images: missing, expected an image", param="init_images")
    if len(body.init_images) not in (1, _count(body, limits)):
        raise WebError(
            f"init_images: found {len(body.init_images)}, expected one, or one for each picture", param="init_images"
        )
    images = [
        read_image(file_of(one, "init_images"), name="init_images", most=limits.pixels) for one in body.init_images
    ]
    strength = DEFAULT_STRENGTH if body.denoising_strength is None else body.denoising_strength
    if body.resize_mode:
        raise WebError("resize_mode: an image is resized to width and height; send 0", param="resize_mode")
    if not body.mask:
        return {"image": images if len(images) > 1 else images[0], "strength": strength}
    if len(images) > 1:
        raise WebError("init_images: found several with a mask, expected one", param="init_images")
    return {"image": images[0], "mask": _mask(body, body.mask, limits), "strength": strength}


def _mask(body: Img2Img, mask: str, limits: Limits) -> Image.Image:
    refuse_unless_neutral("inpaint_full_res", body.inpaint_full_res)
    if body.inpainting_fill not in (None, ORIGINAL):
        raise WebError(
            f"inpainting_fill: what is repainted begins with the image; send {ORIGINAL}", param="inpainting_fill"
        )
    image = read_image(file_of(mask, "mask"), name="mask", most=limits.pixels)
    return mask_of(image, inverted=body.inpainting_mask_invert is True, blur=blur_of(body))
