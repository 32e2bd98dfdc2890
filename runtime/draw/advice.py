"""Why a picture may have left the range of finite numbers, and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.errors import NotFiniteError
from latentrt.engines.spec import Precision
from latentrt.runtime.draw.finite import LATENTS, PIXELS, START

if TYPE_CHECKING:
    from latentrt.runtime.draw.job import Job

# Above these, pictures are rarely meant: they are named as a likely cause, and nothing is promised below them.
LARGE_GUIDANCE, LARGE_SCALE, LARGE_LATENT = 30.0, 2.0, 100.0
FLOAT16 = "float16 ends at 65504, and {what} run in it: export the checkpoint again with --precision fp32"
DAMAGED = "the weights may be damaged: run `latentrt verify` on the bundle"


def explain(error: NotFiniteError, job: Job, precision: Precision) -> NotFiniteError:
    """Return the error with its likely causes in a job and what to try.

    precision: what the engines compute in
    """
    stages = error.stages or (job.plan.stages if error.place == LATENTS else None)
    causes = _large(error, job) + _narrow(error, precision) or [DAMAGED]
    advice = f", so no picture is returned. Likely causes: {'; '.join(causes)}"
    return NotFiniteError(error.place, error.pictures, stage=error.stage, stages=stages, advice=advice)


def _large(error: NotFiniteError, job: Job) -> list[str]:
    """Name what was asked for in sizes that are rarely meant."""
    latents, guidance = job.request.latents, float(job.guidance.scales.max())
    followed = [one.component for one in job.controls if abs(one.scale) > LARGE_SCALE]
    shown = [one.spec.name for one in job.images if float(np.abs(one.scale).max()) > LARGE_SCALE]
    causes = {
        f"a guidance of {guidance:g} is very large, take 3 to 15": guidance > LARGE_GUIDANCE and error.place != START,
        f"the scales of {', '.join(shown)} are very large, take 0.5 to 1": bool(shown),
        f"the scales of {', '.join(followed)} are very large, take 1": bool(followed),
        "the LoRAs change the weights too much, lower their scales or omit them": bool(job.request.loras),
        "the latents that were given are very large, take unit noise": latents is not None
        and float(np.abs(latents).max()) > LARGE_LATENT,
    }
    return [sentence for sentence, applies in causes.items() if applies]


def _narrow(error: NotFiniteError, precision: Precision) -> list[str]:
    if precision == "fp32":
        return []
    if error.place == PIXELS:
        return [FLOAT16.format(what="the decoder was") + ", or with --vae and one that was made for float16"]
    return [FLOAT16.format(what="the networks were")]
