"""Windows of frames: which of a video's frames a denoiser sees at once, and what each window says of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from latentrt.engines.spec import Array

Windows = tuple[tuple[int, ...], ...]
"""The slots of each window, all of one length: a slot is in one of them at least."""


SHARE = 4  # windows share a quarter of their frames, where nothing else is asked for


def plan_windows(frames: int, window: int, overlap: int | None = None) -> Windows:
    """Return the windows of a video: each begins `window - overlap` frames after the one before, the last ends with it.

    overlap: below `window`; None for a quarter of it
    """
    length = min(frames, window)
    shared = window // SHARE if overlap is None else overlap
    starts = [*range(0, frames - length, max(1, length - shared)), frames - length]
    return tuple(tuple(range(start, start + length)) for start in starts)


def repeated(windows: Windows, times: int, frames: int) -> Windows:
    """Return the windows of several videos of as many frames, one behind another."""
    return tuple(tuple(video * frames + frame for frame in one) for video in range(times) for one in windows)


def shares_of(windows: Sequence[Sequence[int]]) -> Array:
    """Return what each row of the windows, one behind another, says of its frame: (rows,) float32.

    A window's say rises from its ends to its middle, so that no frame shows where one begins; a frame's add up to 1.
    """
    own = np.array(windows, dtype=np.int64)
    rising = np.minimum(np.arange(1, own.shape[1] + 1), np.arange(own.shape[1], 0, -1))
    says = np.broadcast_to(rising, own.shape).reshape(-1)
    total = np.bincount(own.reshape(-1), weights=says)
    return np.asarray(says / total[own.reshape(-1)], dtype=np.float32)
