"""What txt2img and img2img answer, as their clients read it."""

from __future__ import annotations

import base64
import json
import time
from typing import Any, cast

import msgspec
from PIL import Image

from latentrt.runtime.images.write_png import community_name, parameters
from latentrt.runtime.request import Request
from latentrt.runtime.serve.a1111.images import blended, blur_of
from latentrt.runtime.serve.a1111.schema import Drawing, Drawn, Img2Img
from latentrt.runtime.serve.jobs import Job

UNSENT = ("init_images", "mask")  # not sent back unless the client asks for them


def answer(body: Drawing, request: Request, job: Job) -> Drawn:
    """Return the answer to a body: with all pictures of its job, or those that were done when it was interrupted."""
    files = [] if body.send_images is False else [job.files[picture] for picture in sorted(job.files)]
    if isinstance(body, Img2Img) and body.mask and any(blur_of(body)):
        files = [blended(file, cast(Image.Image, request.image), cast(Image.Image, request.mask)) for file in files]
    return Drawn(
        images=[base64.b64encode(file).decode() for file in files],
        parameters=_sent(body),
        info=json.dumps(_info(body, request, job), ensure_ascii=False),
    )


def _sent(body: Drawing) -> dict[str, Any]:
    """Return what was asked, without the images and without what this service does not have."""
    back = getattr(body, "include_init_images", None) is True
    return {name: value for name, value in msgspec.to_builtins(body).items() if back or name not in UNSENT}


def _info(body: Drawing, request: Request, job: Job) -> dict[str, Any]:
    pictures = job.view().pictures
    if not pictures:
        return {"prompt": body.prompt, "all_prompts": [], "all_seeds": [], "infotexts": [], "interrupted": True}
    settings, seeds, count = pictures[0].settings, [one.seed for one in pictures], len(pictures)
    subseeds = [one.settings.further.get("variation_seed", one.seed) for one in pictures]
    width, height = settings.size
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * count,
        "negative_prompt": settings.negative_prompt or "",
        "all_negative_prompts": [settings.negative_prompt or ""] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": request.variation_strength,
        "width": width,
        "height": height,
        "sampler_name": community_name(settings.sampler),
        "cfg_scale": settings.guidance,
        "steps": settings.steps,
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": settings.model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": settings.further.get("strength", 0),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters(one.settings, one.seed) for one in pictures],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "version": settings.version,
        "interrupted": job.state == "cancelled",
    }
