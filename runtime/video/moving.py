"""A video of an image, as Stable Video Diffusion makes them: checked against the bundle, and its image laid into rows.

The denoiser attends to the image's embedding, sees its latents beside each frame's own, and is told three numbers. For
the negative prompt's rows embedding and latents are zeros.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import DenoiserSpec, Manifest
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import IMAGE_LATENTS
from latentrt.engines.workspace.contract import TEXT, Workspace
from latentrt.runtime.draw.draw import BatchSource
from latentrt.runtime.draw.finite import SHOWN, START, finite
from latentrt.runtime.draw.job import Job, check_size, latent_shape, resolve_any
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.request import NOISES, Request
from latentrt.runtime.video.draw import draw_videos
from latentrt.runtime.video.request import MovingImage, VideoJob, VideoRequest, number, options_of_frames

# What belongs to pictures of a text, by what a request calls it, and what it is.
NOT_OF_IMAGES = {
    "negative_prompt": "there is no text that it could go with",
    "loras": "there are none for this kind of denoiser",
    "controls": "no ControlNets or T2I-Adapters are made for this kind of denoiser",
    "image_prompts": "no IP-Adapters are made for this kind of denoiser, and `image` is what it reads",
    "strength": "the video is drawn from noise beside the image",
    "skip_layer_guidance": "none of its layers can be skipped",
}
# As diffusers' StableVideoDiffusionPipeline has them.
FPS, BUCKET, NOISE = 7.0, 127.0, 0.02
MOST_BUCKET = 255


def resolve_moving(
    asked: VideoRequest, options: dict[str, Any], manifest: Manifest, *, videos: int, frames: int
) -> VideoJob:
    """Check a video of an image against a bundle. Raises RequestError."""
    if asked.prompt is not None:
        raise RequestError("prompt: this bundle makes videos of an image and reads no text; omit it")
    for name, reason in NOT_OF_IMAGES.items():
        if options.get(name):
            raise RequestError(f"{name}: {reason}; omit it")
    source = options.pop("image", None)
    if source is None:
        raise RequestError("image: this bundle makes videos of an image, and there is none; give `image`")
    fps = number("fps", _given(asked.fps, FPS), least=1)
    bucket = number("motion_bucket", _given(asked.motion_bucket, BUCKET), least=0, most=MOST_BUCKET)
    noise = number("noise_augmentation", _given(asked.noise_augmentation, NOISE), least=0)
    spec = manifest.denoisers[manifest.denoiser]
    options["size"] = check_size(options.get("size"), manifest)
    image = _image(source, manifest, spec, videos=videos, size=options["size"], noise=noise)
    if options.get("guidance") is None and spec.frames is not None and spec.frames.guidance is not None:
        options["guidance"] = spec.frames.guidance[1]
    job = resolve_any(Request(prompt=[""] * frames * videos, **options_of_frames(options, videos, frames)), manifest)
    # It was trained with the number before this one: diffusers subtracts it too.
    told = {"fps": fps - 1, "motion": bucket, "augmentation": noise}
    job = msgspec.structs.replace(job, numbers={name: told[name] for name in spec.sizes if name in told})
    return VideoJob(job=job, videos=videos, frames=frames, fps=fps, image=image)


def _given(asked: float | None, default: float) -> float:
    return default if asked is None else asked


def _image(
    source: Any, manifest: Manifest, spec: DenoiserSpec, *, videos: int, size: tuple[int, int], noise: float
) -> MovingImage:
    from latentrt.runtime.images.clip import read_whole_for_clip  # with Pillow
    from latentrt.runtime.images.read import read_pictures

    assert spec.shown is not None
    side = manifest.components[spec.shown].inputs[0].shape[-1]
    assert isinstance(side, int)
    pixels = read_pictures(source, factor=manifest.latents.cell, size=size)
    if len(pixels) not in (1, videos):
        raise RequestError(f"image: found {len(pixels)} for {videos} videos, expected one, or one for each")
    return MovingImage(pixels=pixels, seen=read_whole_for_clip(source, side=side, name="image"), noise=noise)


def moving_source(loaded: Loaded, video: VideoJob, image: MovingImage) -> BatchSource:
    """Return where the image and the noise of a video come from.

    A video's stream gives the noise of its image first, (3, height, width), then each frame's.
    """
    start, job = time.perf_counter(), video.job
    streams = [NOISES[job.request.noise](seed) for seed in video.seeds]
    width, height = job.size
    pixels = image.pixels.transpose(0, 3, 1, 2)
    noised = np.stack([one.normal((3, height, width)) for one in streams]) * np.float32(image.noise) + pixels

    def write(workspace: Workspace, denoiser: str, slots: slice) -> None:
        parameters = loaded.drawing.encode(job, workspace.shape, np.asarray(noised, dtype=np.float32))
        latents = parameters[:, : parameters.shape[1] // 2]  # as the VAE has them: it is the frames that are scaled
        finite(latents, START, pictures=len(latents))
        for name, array in ((TEXT, _embeddings(loaded, denoiser, image)[:, None]), (IMAGE_LATENTS, latents)):
            write_rows(workspace, name, _rows(job, video, array), slots)

    return BatchSource(
        tokens={part.denoiser: loaded.manifest.text_tokens(part.denoiser) for part in job.ranges},
        tokenize_s=time.perf_counter() - start,
        write=write,
        draw=draw_videos(streams, frames=video.frames, shape=latent_shape(job.size, loaded.manifest.latents)),
    )


def _embeddings(loaded: Loaded, denoiser: str, image: MovingImage) -> Array:
    """Return what the image encoder gives: (1 or n, width), float32. Raises NotFiniteError."""
    component = loaded.manifest.denoisers[denoiser].shown
    assert component is not None
    (taken,) = loaded.manifest.components[component].inputs
    found = loaded.opened.sizeless(component)({taken.name: image.seen})["image_embeds"]
    return finite(np.array(found, dtype=np.float32), SHOWN, pictures=len(image.seen))


def _rows(job: Job, video: VideoJob, array: Array) -> Array:
    """Return a row for every frame of every video, and zeros for what is guided away from. array: (1 or n, …)"""
    each = np.broadcast_to(array, (video.videos, *array.shape[1:])).repeat(video.frames, axis=0)
    return np.concatenate([each, *[np.zeros_like(each)] * (job.guidance.most - 1)])
