"""A video of a text: its prompts, mixed from frame to frame, and the noise of its frames."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import RequestError
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.draw.animation import Frame, frame_rows
from latentrt.runtime.draw.draw import BatchSource
from latentrt.runtime.draw.finite import TEXT, finite
from latentrt.runtime.draw.job import latent_shape, resolve
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.request import NOISES, Request
from latentrt.runtime.video.draw import draw_videos
from latentrt.runtime.video.request import VideoJob, VideoRequest, number, options_of_frames, whole_number

OF_IMAGES = ("motion_bucket", "noise_augmentation")  # of videos of an image alone
FPS = 8.0
FROM_IMAGES = 2  # draws that an image start takes before its sampler's: of the images' distribution, and the noise


def resolve_text(
    asked: VideoRequest, options: dict[str, Any], manifest: Manifest, *, videos: int, frames: int
) -> VideoJob:
    """Check a video of a text against a bundle. Raises RequestError."""
    for name in OF_IMAGES:
        if getattr(asked, name) is not None:
            raise RequestError(f"{name}: the denoiser of this bundle is not told of it; omit it")
    keys, mixed = _keys(asked.prompt, frames)
    nearest = [keys[one.second if one.weight > 0.5 else one.first] for one in mixed]
    job = resolve(Request(prompt=nearest * videos, **options_of_frames(options, videos, frames)), manifest)
    fps = FPS if asked.fps is None else number("fps", asked.fps, least=0, open_end=True)
    return VideoJob(job=job, videos=videos, frames=frames, fps=fps, keys=keys, mixed=mixed)


def _keys(prompt: str | Mapping[int, str] | None, frames: int) -> tuple[tuple[str, ...], tuple[Frame, ...]]:
    """Return the prompts, and between which of them each frame's text lies."""
    places = {0: prompt} if isinstance(prompt, str) else prompt
    if not isinstance(places, Mapping) or not places or not all(isinstance(text, str) for text in places.values()):
        raise RequestError(f"prompt: found {prompt!r}, expected a text, or texts by the number of a frame")
    at = sorted(whole_number("prompt, the number of a frame", place, 0, frames - 1) for place in places)
    return tuple(places[place] for place in at), tuple(_between(at, frame) for frame in range(frames))


def _between(at: Sequence[int], frame: int) -> Frame:
    after = next((number for number, place in enumerate(at) if place >= frame), len(at) - 1)
    before = max(0, after - 1) if at[after] > frame else after
    span = at[after] - at[before]
    return Frame(first=before, second=after, weight=(frame - at[before]) / span if span else 0.0)


def text_source(loaded: Loaded, video: VideoJob) -> BatchSource:
    """Return where a video's text and noise come from. Raises RequestError on what cannot be read."""
    start, job = time.perf_counter(), video.job
    prompts, further = job.read_groups(video.keys, (job.negatives[0],) * len(video.keys))
    texts = {part.denoiser: loaded.read(prompts, further, denoiser=part.denoiser) for part in job.ranges}
    frames, each = video.mixed * video.videos, len(video.keys)

    def write(workspace: Workspace, denoiser: str, slots: slice) -> None:
        for name, array in texts[denoiser].items():
            parts = [array[first : first + each] for first in range(0, len(array), each)]
            rows = np.concatenate([frame_rows(part, frames) for part in parts])
            write_rows(workspace, name, finite(rows, TEXT, pictures=len(frames)), slots)

    return BatchSource(
        tokens={denoiser: arrays["encoder_hidden_states"].shape[1] for denoiser, arrays in texts.items()},
        tokenize_s=time.perf_counter() - start,
        write=write,
        draw=draw_videos(
            [NOISES[job.request.noise](seed) for seed in video.seeds],
            frames=video.frames,
            shape=latent_shape(job.size, loaded.manifest.latents),
            in_order=FROM_IMAGES if video.from_images else 0,
        ),
    )
