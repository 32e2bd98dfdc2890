"""A call for a video checked against a bundle: of a text, or of an image that moves, as its denoiser reads."""

from __future__ import annotations

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import FrameRange, Manifest
from latentrt.engines.bundle.windows import Windows, repeated, shares_of
from latentrt.engines.errors import RequestError
from latentrt.runtime.draw.draw import BatchSource
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.sampling.guidance import Guidance, plan_guidance
from latentrt.runtime.video.moving import moving_source, resolve_moving
from latentrt.runtime.video.request import MOST_FRAMES, VideoJob, VideoRequest, number, whole_number
from latentrt.runtime.video.text import resolve_text, text_source

# What belongs to pictures that are drawn from a seed each.
NOT_HERE = ("mask", "variation_seed", "latents", "refine_from")


def resolve_video(asked: VideoRequest, manifest: Manifest) -> VideoJob:
    """Check what is asked against a bundle. Raises RequestError, with one sentence, on what cannot be drawn."""
    known = manifest.denoisers[manifest.denoiser].frames
    if known is None:
        raise RequestError(
            "this bundle draws pictures, not videos; export its checkpoint with --motion-adapter PATH, or draw the way "
            "from picture to picture with animate()"
        )
    default = min(known.window, known.most)
    frames = whole_number("frames", default if asked.frames is None else asked.frames, 1, _most(known))
    options = dict(asked.options)
    for name in NOT_HERE:
        if options.get(name) is not None:
            raise RequestError(f"{name}: videos have none; omit it")
    videos, windows = whole_number("n", options.pop("n", 1), 1, MOST_FRAMES), _windows(asked, known, frames)
    if len(windows) > 1 and options.get("guidance_rescale"):
        raise RequestError("guidance_rescale: a video of several windows has none; omit it, or ask for fewer frames")
    if manifest.denoisers[manifest.denoiser].shown is not None:
        video = resolve_moving(asked, options, manifest, videos=videos, frames=frames)
    else:
        video = resolve_text(asked, options, manifest, videos=videos, frames=frames)
    job = msgspec.structs.replace(
        video.job,
        windows=repeated(windows, videos, frames),
        shares=np.tile(shares_of(windows), videos),
        guidance=_guidance(asked, video, known),
        chunk=_chunk(asked, frames),
    )
    return msgspec.structs.replace(video, job=job)


def video_source(loaded: Loaded, video: VideoJob) -> BatchSource:
    """Return where what a denoiser reads for a video, and its noise, come from. Raises RequestError."""
    return text_source(loaded, video) if video.image is None else moving_source(loaded, video, video.image)


def _windows(asked: VideoRequest, known: FrameRange, frames: int) -> Windows:
    for name in ("window", "overlap") if known.whole else ():
        if getattr(asked, name) is not None:
            raise RequestError(f"{name}: this bundle's denoiser sees a video as a whole; omit it")
    window = (
        min(known.window, known.most) if asked.window is None else whole_number("window", asked.window, 1, known.most)
    )
    overlap = None if asked.overlap is None else whole_number("overlap", asked.overlap, 0, window - 1)
    return known.windows(frames, window, overlap)


def _guidance(asked: VideoRequest, video: VideoJob, known: FrameRange) -> Guidance:
    """Return the guidance of each frame: on a line from the first frame's to the last one's."""
    job, default = video.job, known.guidance and known.guidance[0]
    first = default if asked.first_guidance is None else number("first_guidance", asked.first_guidance, least=0)
    if first is None:
        return job.guidance
    scales = np.linspace(first, number("guidance", job.scale, least=0), video.frames, dtype=np.float32)
    return plan_guidance(
        job.plan,
        np.tile(scales, video.videos),
        len(job.prompts),
        interval=job.request.guidance_interval,
        rescale=job.guidance.rescale,
        skip=job.guidance.skip,
        skip_interval=job.request.skip_layer_interval,
    )


def _chunk(asked: VideoRequest, frames: int) -> int | None:
    if asked.decode_chunk is None:
        return None
    chunk = whole_number("decode_chunk", asked.decode_chunk, 1, MOST_FRAMES)
    return chunk if chunk < frames else None


def _most(known: FrameRange) -> int:
    return known.most if known.whole else MOST_FRAMES
