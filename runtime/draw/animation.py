"""Animation as data: where each frame lies between key frames, and what noise and text that gives a batch of frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.request import KeyFrame, Options, Request
from latentrt.runtime.sampling.noise import TorchCpuNoise

PICTURE = (1, 2, 3)  # the axes of one picture's noise in (n, C, h, w)


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame, by the numbers of the key frames before and after it, and its share of the way between them."""

    first: int
    second: int
    weight: float


class NoiseStream(Protocol):
    """A seed's stream of unit normals."""

    def normal(self, shape: Sequence[int]) -> Array: ...


def frames_between(keys: int, frames: int, *, loop: bool = False) -> tuple[Frame, ...]:
    """Return the frames of an animation at even steps from the first key frame to the last.

    loop: from the last on to the first again, which is then not repeated at the end: the animation runs round
    Raises RequestError on fewer than two key frames, and on fewer frames than those.
    """
    if keys < 2:
        raise RequestError(f"keys: found {keys}, expected at least two key frames")
    if frames < keys:
        raise RequestError(f"frames: found {frames}, expected at least {keys}, one for each key frame")
    spans, steps = (keys, frames) if loop else (keys - 1, frames - 1)
    return tuple(_frame(i * spans, steps, keys) for i in range(frames))


def _frame(position: int, steps: int, keys: int) -> Frame:
    """Return the frame at position / steps of one span: whole numbers, so that a key frame is met exactly."""
    span, rest = divmod(position, steps)
    return Frame(first=span % keys, second=(span + 1) % keys if rest else span % keys, weight=rest / steps)


def batches(frames: Sequence[Frame], size: int) -> list[tuple[Frame, ...]]:
    """Return the frames in order, `size` at a time: each full but the last. Raises RequestError on no size."""
    if size < 1:
        raise RequestError(f"batch: found {size}, expected at least 1")
    return [tuple(frames[start : start + size]) for start in range(0, len(frames), size)]


def between(keys: Sequence[KeyFrame], frames: Sequence[Frame], options: Options) -> Request:
    """Return the request of a batch of frames: each is said to be of the key frame it is nearest to."""
    nearest = [keys[frame.second if frame.weight > 0.5 else frame.first] for frame in frames]
    own: Options = {
        "negative_prompt": [key.negative_prompt for key in nearest],
        "seed": [key.seed for key in nearest],
    }
    return Request(prompt=[key.prompt for key in nearest], **(options | own))


def check_keys(keys: Sequence[KeyFrame]) -> tuple[KeyFrame, ...]:
    """Return the key frames. Raises RequestError if they are something else, or a field is of another type."""
    if not isinstance(keys, list | tuple) or not all(isinstance(key, KeyFrame) for key in keys):
        raise RequestError(f"keys: found {keys!r}, expected a list of KeyFrame(prompt=…, seed=…)")
    for number, key in enumerate(keys, 1):
        fields = {"prompt": str, "seed": int, "negative_prompt": str | None}
        for name, kind in fields.items():
            if not isinstance(value := getattr(key, name), kind) or isinstance(value, bool):
                raise RequestError(f"keys: found {value!r} for the {name} of number {number}")
    return tuple(keys)


def frame_text(encoded: Array, frames: Sequence[Frame]) -> Array:
    """Return the text of a batch of frames: (b, T, D), float32. encoded: of the key frames' prompts, (K, T, D)."""
    first, second, weights = _gather(frames)
    return mix_text(encoded[first], encoded[second], weights.reshape(-1, 1, 1))


def frame_rows(encoded: Array, frames: Sequence[Frame]) -> Array:
    """Return what `frame_text` returns, for text or for pooled text: (b, …) for (K, …)."""
    flat = frame_text(encoded.reshape(len(encoded), 1, -1), frames)
    return flat.reshape(len(frames), *encoded.shape[1:])


def frame_draw(
    seeds: Sequence[int],
    frames: Sequence[Frame],
    shape: tuple[int, int, int],
    *,
    stream: Callable[[int], NoiseStream] = TorchCpuNoise,
) -> Callable[[], Array]:
    """Return what draws for a batch of frames: each call gives the next unit normals, (b, C, h, w), float32.

    seeds: of the key frames; shape: (C, h, w)
    Each frame's noise is on the arc between its key frames' own, in the first draw and in those of a sampler that
    draws at every stage, so that nothing flickers. It does not depend on the batch that a frame is in.
    """
    first, second, weights = _gather(frames)
    used, index = np.unique(np.concatenate([first, second]), return_inverse=True)
    streams = [stream(seeds[key]) for key in used]
    low, high = index[: len(frames)], index[len(frames) :]

    def draw() -> Array:
        drawn = np.stack([one.normal(shape) for one in streams])
        return slerp(drawn[low], drawn[high], weights.reshape(-1, 1, 1, 1), axes=PICTURE)

    return draw


def _gather(frames: Sequence[Frame]) -> tuple[Array, Array, Array]:
    first, second = (np.array([getattr(f, name) for f in frames], dtype=np.int64) for name in ("first", "second"))
    return first, second, np.array([frame.weight for frame in frames])


COLUMNS = (-2,)  # the axis along which A1111's interface measures noise of (C, h, w): each column for itself
STRAIGHT = 1e-6  # the sine of an angle below which float64 has no arc left to follow


def slerp(first: Array, second: Array, weight: float | Array, *, axes: tuple[int, ...] | None = None) -> Array:
    """Return the point of the arc from one vector to another: the shape of both together, float32.

    weight: 0 gives the first and 1 the second, exactly; a number, or an array that broadcasts with the vectors
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

    first, second: (..., T, D); weight: 0 gives the first and 1 the second, exactly
    Raises RequestError if the prompts have different numbers of tokens.
    """
    if first.shape[-2:] != second.shape[-2:]:
        raise RequestError(
            f"prompts to mix: found {first.shape[-2]} tokens in one and {second.shape[-2]} in the other, expected the "
            "same number; make both the same number of chunks long"
        )
    weight = np.asarray(weight, dtype=np.float32)
    return np.asarray((1 - weight) * first + weight * second, dtype=np.float32)
