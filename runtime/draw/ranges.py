"""Which denoiser takes which stages of a plan."""

from __future__ import annotations

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.runtime.sampling.plan import SamplingPlan


class DenoiserRange(msgspec.Struct, frozen=True, kw_only=True):
    """Stages of a plan that one denoiser takes: from the first to before the end."""

    denoiser: str
    stages: range


def split(
    plan: SamplingPlan, refine_from: float, denoisers: tuple[str, ...], *, train_timesteps: int
) -> tuple[DenoiserRange, ...]:
    """Return who takes which stages of a plan, in order; a denoiser without a stage is omitted.

    refine_from: the share of the training timesteps, from the noisy end, before which the base denoises: diffusers'
        denoising_end and denoising_start. A stage belongs to the refiner where its timestep lies below, and so do
        all stages after the first such one.
    denoisers: the one that draws, and the one that refines
    Raises RequestError if no stage is left for the refiner.
    """
    if not 0 < refine_from < 1:
        raise RequestError(f"refine_from: found {refine_from:g}, expected a share of the noise between 0 and 1")
    cutoff = round(train_timesteps - refine_from * train_timesteps)
    below = plan.timesteps < cutoff
    if not below.any():
        raise RequestError(
            f"refine_from: the last of {plan.stages} stages is at timestep {plan.timesteps[-1]:g}, and {refine_from:g} "
            f"leaves the refiner those below {cutoff}; lower it, or take more steps"
        )
    switch = int(np.argmax(below))
    parts = range(switch), range(switch, plan.stages)
    return tuple(DenoiserRange(denoiser=name, stages=part) for name, part in zip(denoisers, parts, strict=True) if part)
