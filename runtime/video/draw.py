"""A video drawn: the text of its frames, and its noise in the order in which diffusers' pipelines draw it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.draw.animation import frame_rows
from latentrt.runtime.draw.draw import BatchSource
from latentrt.runtime.draw.finite import TEXT, finite
from latentrt.runtime.draw.job import latent_shape
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.request import NOISES, NoiseSource
from latentrt.runtime.result import Result
from latentrt.runtime.video.request import VideoJob
from latentrt.runtime.video.result import VideoResult

FROM_IMAGES = 2  # draws that an image start takes before its sampler's: of the images' distribution, and the noise


def video_source(loaded: Loaded, video: VideoJob) -> BatchSource:
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
            job.request.noise,
            video.seeds,
            frames=video.frames,
            shape=latent_shape(job.size, loaded.manifest.latents),
            in_order=FROM_IMAGES if video.from_images else 0,
        ),
    )


def draw_videos(
    source: NoiseSource, seeds: Sequence[int], *, frames: int, shape: tuple[int, int, int], in_order: int
) -> Callable[[], Array]:
    """Return what draws the next unit normals of each video's own stream: (videos * frames, C, h, w), float32.

    in_order: how many draws are frame after frame; the later ones are channel after channel, (C, frames, h, w), as
        diffusers draws for AnimateDiff
    """
    streams = [NOISES[source](seed) for seed in seeds]
    orders = itertools.chain([True] * in_order, itertools.repeat(False))
    channels, height, width = shape

    def draw() -> Array:
        by_frame = next(orders)
        size = (frames, *shape) if by_frame else (channels, frames, height, width)
        drawn = [one.normal(size) for one in streams]
        return np.concatenate([one if by_frame else one.swapaxes(0, 1) for one in drawn])

    return draw


def as_video(result: Result, video: VideoJob) -> VideoResult:
    """Return the pictures of a video's job as its frames."""
    each = slice(None, None, video.frames)
    return VideoResult(
        frames=result.pixels.reshape(video.videos, video.frames, *result.pixels.shape[1:]),
        seeds=video.seeds,
        settings=result.settings[each],
        seconds=result.seconds,
        step_seconds=result.step_seconds,
        backend=result.backend,
        reason=result.reason,
        warnings=result.warnings,
    )
