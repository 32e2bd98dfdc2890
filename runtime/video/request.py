"""What a call for a video asks for, checked against a bundle: its frames are the pictures of one job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.animation import Frame
from latentrt.runtime.draw.job import Job, seeds_of
from latentrt.runtime.request import Control, Options

MOST_FRAMES = 10_000  # of a video, all of which are in memory


class VideoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A video, or several. Only the prompt is needed or, where the bundle makes videos of an image, that image alone.

    prompt: a text, or texts by the number of the frame that each is for: between two of them the text is mixed on a
        line, before the first and after the last it stays; None where an image is what is read
    frames: how many, None for as many as the denoiser was trained with; each more than the bundle's window costs a
        share of a window
    window: how many frames the denoiser sees at once; None for as many as it was trained with. A longer video is drawn
        in windows that overlap, whose outputs are mixed
    overlap: how many frames of a window are in the one before too; None for a quarter of them
    fps: frames a second, None for 8 or, of an image, 7: what a file plays, and what a denoiser of an image is told
    first_guidance: the scale for the first frame, from which it goes on a line to `guidance` for the last; None for
        that of all or, of an image, 1 (to 3)
    motion_bucket, noise_augmentation: of an image: how much moves, 0 to 255, None for 127; and how much noise is added
        to it, from 0 up, None for 0.02, which lets the video leave it
    decode_chunk: how many frames are decoded at once, None for all: fewer take less memory
    options: the fields of `Request` beside its prompt, of every frame; here `n` and `seed` count videos, and `image`
        and those of `controls` are one for all frames or one for each; where the bundle makes videos of an image,
        `image` is one for all videos or one for each
    """

    prompt: str | Mapping[int, str] | None = None
    frames: int | None = None
    window: int | None = None
    overlap: int | None = None
    fps: float | None = None
    first_guidance: float | None = None
    motion_bucket: float | None = None
    noise_augmentation: float | None = None
    decode_chunk: int | None = None
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, prompt: str | Mapping[int, str] | None, frames: int | None, options: Mapping[str, Any]) -> Self:
        """Return what a call asks for by keywords. Raises RequestError on one that there is not."""
        own = {name: value for name, value in options.items() if name in cls.__struct_fields__}
        rest = {name: value for name, value in options.items() if name not in own}
        return cls(prompt=prompt, frames=frames, **own, options=rest)


class MovingImage(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An image that moves: one for each video, or one for all.

    pixels: (1 or n, height, width, 3), float32, -1 to 1, as the VAE encodes them once noise was added
    seen: (1 or n, 3, side, side), float32, as the image encoder takes them
    noise: how much is added
    """

    pixels: Array
    seen: Array
    noise: float


class VideoJob(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A video that can be drawn.

    job: whose pictures are the frames, of one video behind another's; keys: the prompts that the text is mixed of
    mixed: where between them each frame of a video lies
    fps: frames a second; image: what moves, where that is read in place of a prompt
    """

    job: Job
    videos: int
    frames: int
    fps: float
    keys: tuple[str, ...] = ()
    mixed: tuple[Frame, ...] = ()
    image: MovingImage | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seed of each video."""
        return self.job.seeds[:: self.frames]

    @property
    def from_images(self) -> bool:
        """Tell whether the frames start from images."""
        return self.job.pixels is not None


def number(name: str, value: object, *, least: float, most: float = math.inf, open_end: bool = False) -> float:
    """Return a finite number of a request. open_end: whether the least is itself too little. Raises RequestError."""
    fits = isinstance(value, int | float | np.number) and not isinstance(value, bool) and np.isfinite(value)
    if not fits or not least <= value <= most or (open_end and value == least):  # type: ignore[operator]
        until = f" to {most:g}" if most < math.inf else "" if open_end else " up"
        raise RequestError(
            f"{name}: found {value!r}, expected a number {'above' if open_end else 'from'} {least:g}{until}"
        )
    return float(value)  # type: ignore[arg-type]


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number of a request. Raises RequestError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name}: found {value!r}, expected a whole number from {least} to {most}")
    return value


def options_of_frames(options: Mapping[str, Any], videos: int, frames: int) -> Options:
    """Return the options of all frames as pictures: a video's seed is that of each, its images are one for each."""
    seeds = seeds_of(options.get("seed"), videos)
    found: dict[str, Any] = {**options, "seed": [seed for seed in seeds for _ in range(frames)]}
    negative = options.get("negative_prompt")
    if isinstance(negative, list | tuple):
        raise RequestError(f"negative_prompt: found {len(negative)}, expected one for all frames")
    if (image := options.get("image")) is not None:
        found["image"] = _each(image, "image", videos, frames)
    if isinstance(controls := options.get("controls", ()), list | tuple):
        found["controls"] = [
            msgspec.structs.replace(one, image=_each(one.image, f"controls, '{one.name}'", videos, frames))
            if isinstance(one, Control)
            else one
            for one in controls
        ]
    return found  # type: ignore[return-value]


def _each(image: Any, name: str, videos: int, frames: int) -> Any:
    """Return an image for every frame of every video, or the one that serves all."""
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    if not isinstance(image, list | tuple) or len(image) == 1:
        return image
    if len(image) != frames:
        raise RequestError(f"{name}: found {len(image)} images, expected one, or one for each of {frames} frames")
    return list(image) * videos
