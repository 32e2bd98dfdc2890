"""What a call for videos gives back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from latentrt.engines.spec import Array
from latentrt.runtime.result import Settings


class VideoResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Videos that were drawn, and what their call took: as for pictures, see `Result`.

    frames: (n, frames, height, width, 3), uint8, sRGB
    settings: one for each video, as are the seeds
    """

    frames: Array
    seeds: tuple[int, ...]
    settings: tuple[Settings, ...]
    seconds: Mapping[str, float]
    step_seconds: tuple[float, ...]
    backend: str
    reason: str
    warnings: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str], *, fps: float = 8.0, video: int = 0, loop: bool = True) -> None:
        """Write one of the videos as GIF, WebP or MP4, by the path's ending.

        Raises RequestError on another ending, and NotInstalledError where MP4's writer is missing.
        """
        from latentrt.runtime.images.write_movie import save_movie

        save_movie(self.frames[video], Path(path), fps=fps, loop=loop)
