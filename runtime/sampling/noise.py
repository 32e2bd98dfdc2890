"""Unit noise that agrees with torch's, so that a seed draws the same picture with and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from latentrt.engines.spec import Array

RESIDENT_THREADS = 132 * 2048  # of an H100 or H200: multiprocessors times threads of each
WARP_BLOCK = 256  # threads in a block of torch's random kernels
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


class TorchCudaNoise:
    """The stream of `torch.Generator("cuda").manual_seed(seed)`: pictures that agree with GPU-noise interfaces.

    Each element is one thread's Philox generator, so the numbers do not depend on the GPU until there are more
    elements than threads resident on it. Successive calls continue the stream.
    resident_threads: multiprocessors times threads of each; matters for large requests only
    """

    def __init__(self, seed: int, *, resident_threads: int = RESIDENT_THREADS) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._threads = resident_threads
        self._rounds_done = 0

    def normal(self, shape: Sequence[int]) -> Array:
        """Return unit normals of this shape, float32."""
        count = math.prod(shape)
        threads = min(self._threads // WARP_BLOCK, -(-count // WARP_BLOCK)) * WARP_BLOCK
        rounds = -(-count // (4 * threads)) if count else 0
        values = [self._round(self._rounds_done + i, threads) for i in range(rounds)]
        self._rounds_done += rounds
        flat = np.concatenate([np.empty(0, dtype=np.float32), *values])[:count]
        return flat.reshape(tuple(shape))

    def _round(self, number: int, threads: int) -> Array:
        """Return four normals of each thread: all firsts, then all seconds, .. (4 * threads,), float32."""
        counters = np.zeros((4, threads), dtype=np.uint64)
        counters[0], counters[1] = number & 0xFFFFFFFF, number >> 32
        counters[2] = np.arange(threads, dtype=np.uint64)
        words = philox(counters, self._key)
        return np.concatenate([*_box_muller_pair(words[0], words[1]), *_box_muller_pair(words[2], words[3])])


def philox(counters: Array, key: tuple[int, int]) -> Array:
    """Return Philox4x32-10 of counters: (4, n) words of 32 bits held in uint64, the same shape and dtype.

    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011)
    """
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b, c, d = counters
    first, second = key
    for _ in range(10):
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (right >> low) ^ b ^ np.uint64(first), right & mask
        c, d = (left >> low) ^ d ^ np.uint64(second), left & mask
        first, second = first + 0x9E3779B9 & 0xFFFFFFFF, second + 0xBB67AE85 & 0xFFFFFFFF
    return np.stack([a, b, c, d])


def _box_muller_pair(x: Array, y: Array) -> tuple[Array, Array]:
    # as cuRAND: uniforms in the middle of each of 2^32 intervals, the sine first
    radius = np.sqrt(-2 * np.log((x.astype(np.float64) + 0.5) * 2.0**-32))
    angle = (y.astype(np.float64) + 0.5) * (2.0**-32 * 2 * math.pi)
    return (radius * np.sin(angle)).astype(np.float32), (radius * np.cos(angle)).astype(np.float32)
