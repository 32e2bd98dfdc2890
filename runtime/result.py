"""What a call gives back: the pictures, and what they were drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from PIL.Image import Image


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What one call asked for, resolved: with these, its images and a seed a picture can be drawn again.

    further: every other option of the request that was not left at its default, images and latents aside
    """

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    model: str
    version: str
    further: Mapping[str, Any]


class CallResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a call gives back beside what it drew.

    settings: one for each picture or video, as are the seeds
    seconds: by stage: adapt, tokenize, encode, denoise, decode, total; adapt is what it took to change the weights from
        those of the call before, 0 where they were the same
    step_seconds: of each stage of the plan, as measured where the engines run
    backend, reason: what ran, and why it was chosen
    warnings: a sentence for each picture that is of one colour all over
    """

    seeds: tuple[int, ...]
    settings: tuple[Settings, ...]
    seconds: Mapping[str, float]
    step_seconds: tuple[float, ...]
    backend: str
    reason: str
    warnings: tuple[str, ...] = ()


class Result(CallResult, frozen=True, kw_only=True, eq=False):
    """Pictures that were drawn. pixels: (n, height, width, 3), uint8, sRGB; the rest is as `CallResult` says."""

    pixels: Array

    @property
    def images(self) -> list[Image]:
        """Return the pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pixels]
