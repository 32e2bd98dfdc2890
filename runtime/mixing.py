"""Between two seeds and between two prompts: arcs for noise, straight lines for text."""

from __future__ import annotations

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array

COLUMNS = (-2,)  # the axis along which A1111's interface measures noise of (C, h, w): each column for itself
STRAIGHT = 1e-6  # the sine of an angle below which float64 has no arc left to follow


def slerp(first: Array, second: Array, weight: float | Array, *, axes: tuple[int, ...] | None = None) -> Array:
    """Return the point of the arc from one vector to another: the shape of both together, float32.

    weight: 0 gives the first and 1 the second, to the bit; a number, or an array that broadcasts with the vectors
    axes: those that make up one vector, None for all; the others hold vectors of their own
    Noise keeps its size on the arc, which it loses on the line between: halfway, three tenths of it.
    Vectors on one line have no arc between them and are mixed along the line.
    Shoemake, Animating Rotation with Quaternion Curves (1985), for vectors of any length.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.sqrt((a * a).sum(axis=axes, keepdims=True) * (b * b).sum(axis=axes, keepdims=True))
    cosine = (a * b).sum(axis=axes, keepdims=True) / np.where(lengths > 0, lengths, 1)
    angle = np.where(lengths > 0, np.arccos(np.clip(cosine, -1, 1)), 0)
    sine, weight = np.sin(angle), np.asarray(weight, dtype=np.float64)
    curved = sine > STRAIGHT
    divisor = np.where(curved, sine, 1)
    low = np.where(curved, np.sin((1 - weight) * angle) / divisor, 1 - weight)
    high = np.where(curved, np.sin(weight * angle) / divisor, weight)
    return np.asarray(low * a + high * b, dtype=np.float32)


def vary(noise: Array, other: Array, strength: float) -> Array:
    """Return noise turned towards another seed's, as A1111's `variation strength` does: (n, C, h, w), float32.

    noise: of the seeds, (n, C, h, w); other: of the variation seeds, the same shape
    Raises RequestError on a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise RequestError(f"variation_strength: found {strength}, expected 0 to 1")
    return slerp(noise, other, strength, axes=COLUMNS)


def variation_seeds(seed: int, variation_seed: int, pictures: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the seed and the variation seed of each picture, as A1111 counts: one seed, its variations in turn."""
    return (seed,) * pictures, tuple(variation_seed + i for i in range(pictures))


def mix_text(first: Array, second: Array, weight: float | Array) -> Array:
    """Return the encoding between two prompts, on a straight line: the shape of both together, float32.

    first, second: (..., T, D); weight: 0 gives the first and 1 the second, to the bit
    Raises RequestError where the prompts have different numbers of tokens.
    """
    if first.shape[-2:] != second.shape[-2:]:
        raise RequestError(
            f"prompts to mix: found {first.shape[-2]} tokens in one and {second.shape[-2]} in the other, expected the "
            "same number; bring both to the same number of chunks"
        )
    weight = np.asarray(weight, dtype=np.float32)
    return np.asarray((1 - weight) * first + weight * second, dtype=np.float32)
