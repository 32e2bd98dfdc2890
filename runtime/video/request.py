"""What a call for a video asks for, checked against a bundle: its frames are the pictures of one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import FrameRange, Manifest
from latentrt.engines.bundle.windows import Windows, plan_windows, repeated, shares_of
from latentrt.engines.errors import RequestError
from latentrt.runtime.draw.animation import Frame
from latentrt.runtime.draw.job import Job, resolve, seeds_of
from latentrt.runtime.request import Control, Options, Request

MOST_FRAMES = 10_000  # of a video, all of which are in memory
# What belongs to pictures that are drawn from a seed each.
NOT_HERE = ("mask", "variation_seed", "latents", "refine_from")


class VideoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A video, or several. Only the prompt is needed.

    prompt: a text, or texts by the number of the frame that each is for: between two of them the text is mixed on a
        line, before the first and after the last it stays
    frames: how many; each more than the bundle's window costs a share of a window
    window: how many frames the denoiser sees at once; None for as many as it was trained with. A longer video is drawn
        in windows that overlap, whose outputs are mixed
    overlap: how many frames of a window are in the one before too; None for a quarter of them
    options: the fields of `Request` beside its prompt, of every frame; here `n` and `seed` count videos, and `image`
        and those of `controls` are one for all frames or one for each
    """

    prompt: str | Mapping[int, str]
    frames: int = 16
    window: int | None = None
    overlap: int | None = None
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)


class VideoJob(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A video that can be drawn.

    job: whose pictures are the frames, of one video behind another's; keys: the prompts that the text is mixed of
    mixed: where between them each frame of a video lies
    """

    job: Job
    videos: int
    frames: int
    keys: tuple[str, ...]
    mixed: tuple[Frame, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seed of each video."""
        return self.job.seeds[:: self.frames]

    @property
    def from_images(self) -> bool:
        """Tell whether the frames start from images."""
        return self.job.pixels is not None


def resolve_video(asked: VideoRequest, manifest: Manifest) -> VideoJob:
    """Check what is asked against a bundle. Raises RequestError, with one sentence, on what cannot be drawn."""
    known = manifest.denoisers[manifest.denoiser].frames
    if known is None:
        raise RequestError(
            "this bundle draws pictures, not videos; export its checkpoint with --motion-adapter PATH, or draw the way "
            "from picture to picture with animate()"
        )
    frames = _whole("frames", asked.frames, 1, MOST_FRAMES)
    options = dict(asked.options)
    for name in NOT_HERE:
        if options.get(name) is not None:
            raise RequestError(f"{name}: videos have none; omit it")
    videos, windows = _whole("n", options.pop("n", 1), 1, MOST_FRAMES), _windows(asked, known, frames)
    if len(windows) > 1 and options.get("guidance_rescale"):
        raise RequestError("guidance_rescale: a video of several windows has none; omit it, or ask for fewer frames")
    keys, mixed = _keys(asked.prompt, frames)
    nearest = [keys[one.second if one.weight > 0.5 else one.first] for one in mixed]
    job = resolve(Request(prompt=nearest * videos, **_of_frames(options, videos, frames)), manifest)
    return VideoJob(
        job=msgspec.structs.replace(
            job, windows=repeated(windows, videos, frames), shares=np.tile(shares_of(windows), videos)
        ),
        videos=videos,
        frames=frames,
        keys=keys,
        mixed=mixed,
    )


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name}: found {value!r}, expected a whole number from {least} to {most}")
    return value


def _windows(asked: VideoRequest, known: FrameRange, frames: int) -> Windows:
    window = min(known.window, known.most) if asked.window is None else _whole("window", asked.window, 1, known.most)
    overlap = None if asked.overlap is None else _whole("overlap", asked.overlap, 0, window - 1)
    return plan_windows(frames, window, overlap)


def _keys(prompt: str | Mapping[int, str], frames: int) -> tuple[tuple[str, ...], tuple[Frame, ...]]:
    """Return the prompts, and between which of them each frame's text lies."""
    places = {0: prompt} if isinstance(prompt, str) else prompt
    if not isinstance(places, Mapping) or not places or not all(isinstance(text, str) for text in places.values()):
        raise RequestError(f"prompt: found {prompt!r}, expected a text, or texts by the number of a frame")
    at = sorted(_whole("prompt, the number of a frame", place, 0, frames - 1) for place in places)
    return tuple(places[place] for place in at), tuple(_between(at, frame) for frame in range(frames))


def _between(at: Sequence[int], frame: int) -> Frame:
    after = next((number for number, place in enumerate(at) if place >= frame), len(at) - 1)
    before = max(0, after - 1) if at[after] > frame else after
    span = at[after] - at[before]
    return Frame(first=before, second=after, weight=(frame - at[before]) / span if span else 0.0)


def _of_frames(options: Mapping[str, Any], videos: int, frames: int) -> Options:
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
