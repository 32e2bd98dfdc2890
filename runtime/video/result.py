"""What a call for videos gives back."""

from __future__ import annotations

import os
from pathlib import Path

from latentrt.engines.spec import Array
from latentrt.runtime.result import CallResult


class VideoResult(CallResult, frozen=True, kw_only=True, eq=False):
    """Videos that were drawn.

    frames: (n, frames, height, width, 3), uint8, sRGB; fps: of them a second, as was asked for
    The rest is as `CallResult` says.
    """

    frames: Array
    fps: float = 8.0

    def save(
        self, path: str | os.PathLike[str], *, fps: float | None = None, video: int = 0, loop: bool = True
    ) -> None:
        """Write one of the videos as GIF, WebP or MP4, by the path's ending.

        fps: frames a second, None for those that were asked for
        Raises RequestError on another ending, and NotInstalledError where MP4's writer is missing.
        """
        from latentrt.runtime.images.write_movie import save_movie

        save_movie(self.frames[video], Path(path), fps=self.fps if fps is None else fps, loop=loop)
