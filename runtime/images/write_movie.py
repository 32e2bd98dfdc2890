"""Frames into a file that moves: GIF and WebP by Pillow, MP4 by PyAV (the extra `latentrt[video]`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
from PIL import Image

from latentrt.engines.bundle.files import atomic_write, disk_errors, require_writable
from latentrt.engines.errors import NotInstalledError, RequestError
from latentrt.engines.spec import Array

FASTEST = {".gif": 50, ".webp": 1000, ".mp4": 240}  # frames a second; browsers slow GIFs with less than 20 ms a frame
WEBP_QUALITY = 90
BT709 = 1  # FFmpeg's number for it. Untagged, a player guesses its colours from the picture's size
MP4_QUALITY = "18"  # x264's constant rate factor: hardly to be told from lossless


def check_movie(path: Path, *, fps: float) -> None:
    """Raise if no movie can be written to a path with this ending, before the first frame is drawn.

    Raises RequestError on another ending than .gif, .webp or .mp4 or an impossible fps, EngineError where MP4's writer
    is missing, BundleError where nothing can be put.
    """
    fastest = FASTEST.get(path.suffix.lower())
    if fastest is None:
        raise RequestError(f"output: '{path}' has the ending '{path.suffix}', expected one of {', '.join(FASTEST)}")
    if not 0 < fps <= fastest:
        raise RequestError(f"fps: found {fps:g}, expected above 0 and at most {fastest} for {path.suffix.lower()}")
    if path.suffix.lower() == ".mp4":
        require_av()
    require_writable(path)


def save_movie(frames: Iterable[Array], path: Path, *, fps: float = 8.0, loop: bool = True) -> None:
    """Write frames as a movie, in one step: a killed run leaves no half movie.

    frames: (height, width, 3), uint8, all of one size; may be drawn while they are written
    path: ends with .gif, .webp or .mp4; its folder is made
    loop: play again and again, or once; of an MP4 that is its player's to say
    Raises what `check_movie` raises, RequestError on no frames or frames of two sizes, BundleError on a full disk.
    """
    check_movie(path, fps=fps)
    with disk_errors(path), atomic_write(path) as beside:
        WRITERS[path.suffix.lower()](_checked(frames), beside, fps, loop)


def require_av() -> ModuleType:
    """Import PyAV, or say how to install it."""
    try:
        import av
    except ImportError:
        raise NotInstalledError(
            "writing MP4 needs PyAV, paths that end with .webp or .gif do not", install="pip install 'latentrt[video]'"
        ) from None
    return cast(ModuleType, av)


def _checked(frames: Iterable[Array]) -> Iterator[Array]:
    size = None
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size or frame.shape[2:] != (3,) or frame.dtype != np.uint8:
            raise RequestError(
                f"frames: found {frame.dtype} of shape {frame.shape}, expected uint8 of one shape (height, width, 3)"
            )
        yield frame
    if size is None:
        raise RequestError("frames: found none, expected at least one")


def frame_times(count: int, fps: float, *, unit: int) -> list[int]:
    """Return how long each frame is shown, in units of 1 / unit seconds: whole numbers whose sum does not drift."""
    ends = [round(i * unit / fps) for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _gif(frames: Iterator[Array], path: Path, fps: float, loop: bool) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    durations = [10 * hundredths for hundredths in frame_times(1 + len(rest), fps, unit=100)]
    repeat = {"loop": 0} if loop else {}
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, **repeat)


def _webp(frames: Iterator[Array], path: Path, fps: float, loop: bool) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=frame_times(1 + len(rest), fps, unit=1000),
        loop=0 if loop else 1,
        quality=WEBP_QUALITY,
    )


def _mp4(frames: Iterator[Array], path: Path, fps: float, _: bool) -> None:
    av = require_av()
    first = next(frames)
    height, width, _ = first.shape
    if width % 2 or height % 2:
        raise RequestError(
            f"frames: found {width}x{height}, expected even sides for .mp4; choose .webp or another size"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": MP4_QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, tag, BT709)
        for frame in itertools.chain([first], frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


WRITERS: Mapping[str, Callable[[Iterator[Array], Path, float, bool], None]] = {
    ".gif": _gif,
    ".webp": _webp,
    ".mp4": _mp4,
}
