"""Guidance as a matrix: the model runs on rows, and a picture's guided output is a weighted sum of them."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import SamplingPlan

ALWAYS = (0.0, 1.0)


class Guidance(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Classifier-free guidance (arXiv:2207.12598) of a batch along a plan.

    scales: (n,), one for each picture; at 1 the prompt alone is followed
    stages: (K,) bool, where the plan is guided; elsewhere a picture costs one model row instead of two
    rescale: how much of the prompt's own contrast to restore, 0 to 1: arXiv:2305.08891, eqs. 14 to 16
    """

    scales: Array
    stages: Array
    rescale: float

    @property
    def needed(self) -> bool:
        """Tell whether any stage looks at the negative prompts."""
        return bool(self.stages.any())


def plan_guidance(
    plan: SamplingPlan,
    scale: float | Array,
    pictures: int,
    *,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
) -> Guidance:
    """Return the guidance of a batch.

    scale: one for all pictures, or (n,). As in diffusers, 1 and below means that the prompt alone is followed.
    interval: the fractions of the plan between which it is guided, see `guided_stages`
    Raises RequestError when a number is not finite or out of range.
    """
    scales = np.asarray(scale, dtype=np.float32)
    if scales.shape not in ((), (pictures,)) or not np.isfinite(scales).all() or (scales < 0).any():
        raise RequestError(
            f"guidance: found {scale}, expected a number from 0 up, or one for each of {pictures} pictures"
        )
    if not 0 <= rescale <= 1:
        raise RequestError(f"guidance_rescale: found {rescale}, expected 0 to 1")
    inside = guided_stages(plan, *interval)
    scales = np.maximum(np.broadcast_to(scales, (pictures,)), np.float32(1))
    return Guidance(scales=scales, stages=inside & bool((scales != 1).any()), rescale=float(rescale))


def guided_stages(plan: SamplingPlan, start: float, stop: float) -> Array:
    """Tell at which stages a plan is guided from one fraction of it to another: (K,) bool.

    start, stop: 0 to 1; stage k of K is guided when start <= k / K < stop, as in arXiv:2404.07724, and so is every
    stage at a timestep between theirs: a solver that looks ahead within a step is guided there too
    Raises RequestError when they are not in order, or no stage lies between them.
    """
    if not 0 <= start < stop <= 1:
        raise RequestError(f"guidance_interval: found {start:g} to {stop:g}, expected 0 <= start < stop <= 1")
    first, end = math.ceil(start * plan.stages), math.ceil(stop * plan.stages)
    if first == end:
        raise RequestError(
            f"guidance_interval: none of {plan.stages} stages lies from {start:g} to {stop:g}; "
            "use guidance 1 for no guidance"
        )
    inside = plan.timesteps[first:end]
    return np.asarray((plan.timesteps >= inside.min()) & (plan.timesteps <= inside.max()))


def guidance_rows(own: Array, negative: Array, rows: int) -> tuple[Array, Array]:
    """Return G of `output = G @ rows` and the slot of each row, for one stage of the pictures in P slots.

    own, negative: (P,), the weight of each picture's prompt and of its negative prompt, 0 where it has no part
    rows: how many there are, P at least: the prompts' own, then negative prompts', then ones without a weight
    returns: (P, rows) float32 and (rows,) int64
    """
    slots, index = len(own), np.arange(rows, dtype=np.int64)
    weights = np.zeros((slots, max(rows, 2 * slots)), dtype=np.float32)
    weights[index[:slots], index[:slots]] = own
    weights[index[:slots], index[:slots] + slots] = negative
    return np.ascontiguousarray(weights[:, :rows]), index % slots
