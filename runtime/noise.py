"""Unit noise that agrees with torch's, so that a seed draws the same picture with and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from latentrt.engines.spec import Array

BLOCK = 16  # torch fills 16 normals at a time; shorter requests take another path


class TorchCpuNoise:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`: `normal(shape)` is what `torch.randn` gives.

    Successive calls continue the stream. Agrees to 5e-7: torch's vectorised logarithm and cosine
    differ from NumPy's in the last bits.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # torch seeds the Mersenne Twister with the low 32 bits
        # Box-Muller makes two; torch keeps the second for the next short request
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> Array:
        """Return unit normals of this shape, float32."""
        count = math.prod(shape)
        values = self._blocks(count) if count >= BLOCK else np.array([self._one() for _ in range(count)])
        return values.astype(np.float32).reshape(tuple(shape))

    def _blocks(self, count: int) -> Array:
        uniforms = self._uniforms(count)
        whole = count - count % BLOCK
        values = np.empty(count, dtype=np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        if count % BLOCK:
            # torch redraws the last 16 rather than draw a part of a block
            values[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return values

    def _uniforms(self, count: int) -> Array:
        raw = self._bits.random_raw(count).astype(np.uint32)
        return (raw & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = 2 * math.pi * self._uniform53(), math.sqrt(-2 * math.log1p(-self._uniform53()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return float((high << 32 | low) & (1 << 53) - 1) * 2.0**-53


def _box_muller(uniforms: Array) -> Array:
    """Turn uniforms into normals in blocks of 16: eight radii, eight angles, cosines before sines."""
    halves = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - halves[:, 0]))
    angle = np.float32(2 * math.pi) * halves[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
