"""Whether a model that was loaded draws: before anybody is served with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.runtime.pipeline import Pipeline, ordinary

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher

LEAST_DB = 35.0  # fp16's; in fp32 a picture that is drawn by the batcher and one by the pipeline differ by 60 dB


def self_test(pipe: Pipeline, batcher: Batcher) -> None:
    """Draw a small picture as a library does and as the service does, and compare. Raises EngineError.

    Both fail themselves where numbers leave the range of floats. It warms the engines up too.
    """
    request = ordinary(pipe.manifest)
    expected = pipe.draw(request).pixels.astype(np.float64)
    (future,) = batcher.submit(request)
    error = np.mean((future.result().pixels - expected) ** 2)
    if error > 255.0**2 / 10 ** (LEAST_DB / 10):
        raise EngineError(
            f"'{pipe.bundle.root}' draws other pictures in a service than by itself, {error:.1f} off in mean square; "
            "see `latentrt verify`"
        )
