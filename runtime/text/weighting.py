"""Weights of words, applied to what the text encoder makes of them.

The equations are those of compel 2 (https://github.com/damian0815/compel, `EmbeddingsProvider`, downweight mode
REMOVE). Of one chunk, Z is its encoding, E the empty prompt's, w the weight of each token (1 for begin, end, padding):

    A = E + w (Z - E)                                    stronger words lie further from saying nothing
    t = tan((1 - w_s) π/2)                               for each segment s that weighs less than 1
    result = (A + Σ t_s A_s) / (1 + Σ t_s)               A_s: the same without the segment's words

At weight 0.5 a segment is halfway to not being written, at 0 it is gone. Each chunk is weighted by itself, so that a
word changes nothing outside its own chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.text.tokenizer import Chunk

Ids = tuple[int, ...]
LEAST = 1e-5  # tan has a pole at weight 0


def is_weighted(chunk: Chunk) -> bool:
    """Tell whether any token weighs other than 1."""
    return any(weight != 1 for weight in chunk.weights)


def needed(chunk: Chunk) -> Iterator[Ids]:
    """Give the tokens of each row that `weigh` asks for."""
    yield chunk.ids
    if is_weighted(chunk):
        yield ()
        for segment in chunk.weak_segments:
            yield chunk.without(segment).ids


def weigh(chunk: Chunk, encoded: Callable[[Ids], Array], *, before: int = 1) -> Array:
    """Return a chunk's encoding with its weights applied: (context, width), in the encoder's dtype.

    encoded: gives the encoding of a row, (context, width), by the tokens between its begin and its end
    before: how many tokens stand before those of the text: one where rows have a begin token
    """
    plain = encoded(chunk.ids)
    if not is_weighted(chunk):
        return plain
    empty = encoded(()).astype(np.float32)
    total, parts = _amplify(chunk, encoded, empty, before), 1.0
    for segment, weight in chunk.weak_segments.items():
        share = math.tan((1 - max(weight, LEAST)) * math.pi / 2)
        total += np.float32(share) * _amplify(chunk.without(segment), encoded, empty, before)
        parts += share
    return (total / np.float32(parts)).astype(plain.dtype)


def _amplify(chunk: Chunk, encoded: Callable[[Ids], Array], empty: Array, before: int) -> Array:
    amplified = encoded(chunk.ids).astype(np.float32)
    for place, weight in enumerate(chunk.weights, start=before):
        if weight != 1:  # not even rounding changes what was not weighted
            amplified[place] = empty[place] + np.float32(weight) * (amplified[place] - empty[place])
    return amplified
