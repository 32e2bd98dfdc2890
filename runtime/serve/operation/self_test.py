"""Whether a model that was loaded draws: before anybody is served with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.engines.verify.verify import compare_engine
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.runtime.batching.drawing_loop import doubling
from latentrt.runtime.draw.job import ordinary, resolve
from latentrt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher

LEAST_DB = 35.0  # fp16's; in fp32 a picture that is drawn by the batcher and one by the pipeline differ by 60 dB


def self_test(pipe: Pipeline, batcher: Batcher) -> None:
    """Compare the engines with the checkpoint's recorded outputs, and a picture of a library with one of the service.

    Raises EngineError where they differ, or drawing does. It warms the engines up too.
    """
    opened = pipe.loaded.opened
    for component, engine in opened.engines.items():
        for row in compare_engine(pipe.bundle, opened.choice.backend, engine, *opened.home):
            if not row.ok:
                raise EngineError(
                    f"'{pipe.bundle.root}' is not served: {component} {row.message}; see `latentrt verify`"
                )
    opened.rest()
    request = ordinary(pipe.manifest)
    expected = pipe.draw(request).pixels.astype(np.float64)
    (future,) = batcher.submit(request)
    error = np.mean((future.result().pixels - expected) ** 2)
    if error > 255.0**2 / 10 ** (LEAST_DB / 10):
        raise EngineError(
            f"'{pipe.bundle.root}' draws other pictures in a service than by itself, {error:.1f} off in mean square; "
            "see `latentrt verify`"
        )


def warm_up(pipe: Pipeline, slots: int) -> tuple[int, ...]:
    """Draw with every number of slots that a batcher of so many uses. Returns them; none on the CPU.

    A GPU's kernels are looked for, and recorded, when a shape is first drawn: that takes as long as several pictures,
    and would fall to the first callers. Raises EngineError, OutOfMemoryError where so many slots have no room.
    """
    opened = pipe.loaded.opened
    if opened.picks_rows:  # nothing that the first picture does is kept for the second
        return ()
    request = ordinary(pipe.manifest)
    job = resolve(request, pipe.manifest)
    (width, height), denoiser = job.size, job.ranges[0].denoiser
    shape = WorkspaceShape(pictures=slots, tokens=pipe.loaded.tokens(job)[denoiser], width=width, height=height)
    counts = opened.slot_counts(shape) or doubling(slots)
    for count in counts:
        pipe.warm_up(msgspec.structs.replace(request, n=count))
    return counts
