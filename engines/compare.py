"""How far two arrays are apart, and pixels from what a decoder gives."""

from __future__ import annotations

import numpy as np

from latentrt.engines.spec import Array


def relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference over the largest expected magnitude, of pixels over 255; NaN gives infinity."""
    if found.shape != expected.shape:
        return float("inf")
    wide, target = found.astype(np.float64), expected.astype(np.float64)
    scale = 255.0 if expected.dtype == np.uint8 else max(float(np.max(np.abs(target))), 1e-12)
    error = float(np.max(np.abs(wide - target))) / scale
    return error if np.isfinite(error) else float("inf")


def to_pixels(sample: Array) -> Array:
    """Turn decoded samples (batch, 3, height, width) in -1..1 into (batch, height, width, 3), uint8."""
    levels = np.clip(sample.astype(np.float32) * np.float32(127.5) + np.float32(127.5), 0, 255)
    return np.asarray(np.rint(levels).transpose(0, 2, 3, 1), dtype=np.uint8)


def largest(array: Array) -> float:
    """Return the largest finite magnitude of an array, 0 where it has none: attention's masks hold infinities."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))
