"""A plan cut where one denoiser hands the latents to the next: SDXL's refiner takes the last part of the noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentrt.engines.canvas import REFINER, UNET
from latentrt.engines.errors import RequestError
from latentrt.runtime.plan import SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Stages of a plan that one denoiser takes: from the first to before the end."""

    denoiser: str
    stages: range


def split(plan: SamplingPlan, refine_from: float | None, *, train_timesteps: int) -> tuple[Leg, ...]:
    """Return who takes which stages of a plan, in order; a denoiser without a stage is left away.

    refine_from: the share of the training timesteps, from the noisy end, before which the base denoises: diffusers'
        denoising_end and denoising_start. A stage belongs to the refiner where its timestep lies below, and so do
        all stages after the first such one.
    Raises RequestError where no stage is left for the refiner.
    """
    if refine_from is None:
        return (Leg(denoiser=UNET, stages=range(plan.stages)),)
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
    legs = Leg(denoiser=UNET, stages=range(switch)), Leg(denoiser=REFINER, stages=range(switch, plan.stages))
    return tuple(leg for leg in legs if leg.stages)
