"""A video drawn: its noise in the order in which diffusers' pipelines draw it, and its frames among the pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.result import Result
from latentrt.runtime.sampling.noise import TorchCpuNoise, TorchCudaNoise
from latentrt.runtime.video.request import VideoJob
from latentrt.runtime.video.result import VideoResult

Stream = TorchCpuNoise | TorchCudaNoise


def draw_videos(
    streams: Sequence[Stream], *, frames: int, shape: tuple[int, int, int], in_order: int | None = None
) -> Callable[[], Array]:
    """Return what draws the next unit normals of each video's own stream: (videos * frames, C, h, w), float32.

    in_order: how many draws are frame after frame, None for all; the later ones are channel after channel, (C, frames,
        h, w), as diffusers draws for AnimateDiff
    """
    orders = itertools.repeat(True) if in_order is None else itertools.chain([True] * in_order, itertools.repeat(False))
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
        fps=video.fps,
    )
