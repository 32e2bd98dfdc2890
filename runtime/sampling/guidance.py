"""Guidance as a matrix: the model runs on rows, and a picture's guided output is a weighted sum of them."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import SamplingPlan

ALWAYS = (0.0, 1.0)
EARLY = (0.01, 0.2)  # where skip-layer guidance is on unless a request says otherwise: diffusers' own
GROUPS = 3  # of model rows: the prompts', the negative prompts', and the prompts' with some layers skipped


class Guidance(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Classifier-free guidance (arXiv:2207.12598) of a batch along a plan, and skip-layer guidance.

    scales: (n,), one for each picture; at 1 the prompt alone is followed
    groups: (K,) int64, the groups of model rows at each stage: 1 for the prompts alone, 2 where the plan is guided, 3
        where it is guided away from what the denoiser gives without some of its layers too
    rescale: how much of the prompt's own contrast to restore, 0 to 1: arXiv:2305.08891, eqs. 14 to 16
    skip: the scale of skip-layer guidance
    """

    scales: Array
    groups: Array
    rescale: float
    skip: float = 0.0

    @property
    def most(self) -> int:
        """Return the groups of model rows at the stage that has most."""
        return int(self.groups.max())

    @property
    def needed(self) -> bool:
        """Tell whether any stage looks at the negative prompts."""
        return self.most > 1

    def weights(self, groups: int) -> Array:
        """Return what each picture's rows weigh at a stage with so many groups: (GROUPS, n) float32.

        With s the scale and g that of skip-layer guidance: s, 1 - s; and s + g, 1 - s, -g
        """
        scales = self.scales if groups > 1 else np.ones_like(self.scales)
        skip = np.full_like(scales, self.skip if groups == GROUPS else 0)
        return np.stack([scales + skip, 1 - scales, -skip])


def plan_guidance(
    plan: SamplingPlan,
    scale: float | Array,
    pictures: int,
    *,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
    skip: float = 0.0,
    skip_interval: tuple[float, float] = EARLY,
) -> Guidance:
    """Return the guidance of a batch.

    scale: one for all pictures, or (n,). As in diffusers, a largest one of 1 and below means that the prompt alone is
        followed.
    interval: the fractions of the plan between which it is guided, see `guided_stages`
    skip: the scale of skip-layer guidance, 0 for none; skip_interval: where it is on, see `skipping_stages`: where the
        plan is guided at all, as in diffusers
    Raises RequestError when a number is not finite or out of range.
    """
    scales = np.asarray(scale, dtype=np.float32)
    if scales.shape not in ((), (pictures,)) or not np.isfinite(scales).all() or (scales < 0).any():
        raise RequestError(
            f"guidance: found {scale}, expected a number from 0 up, or one for each of {pictures} pictures"
        )
    if not 0 <= rescale <= 1:
        raise RequestError(f"guidance_rescale: found {rescale}, expected 0 to 1")
    if skip < 0:
        raise RequestError(f"skip_layer_guidance: found {skip:g}, expected a number from 0 up")
    inside = guided_stages(plan, *interval)
    on = bool((scales > 1).any())
    scales = np.broadcast_to(scales, (pictures,)) if on else np.ones(pictures, dtype=np.float32)
    guided = inside & on
    skipping = guided & skipping_stages(plan, *skip_interval) & (skip > 0)
    if skip and not skipping.any():
        raise RequestError(
            f"skip_layer_guidance: none of {plan.stages} stages is guided and lies from {skip_interval[0]:g} to "
            f"{skip_interval[1]:g}; take more steps, widen skip_layer_interval, or omit it"
        )
    groups = 1 + guided.astype(np.int64) + skipping
    return Guidance(scales=scales, groups=groups, rescale=float(rescale), skip=float(skip))


def guided_stages(plan: SamplingPlan, start: float, stop: float) -> Array:
    """Tell at which stages a plan is guided from one fraction of it to another: (K,) bool.

    start, stop: 0 to 1; stage k of K is guided when start <= k / K < stop, as in arXiv:2404.07724, and so is every
    stage at a timestep between theirs: a solver that looks ahead within a step is guided there too
    Raises RequestError when they are not in order, or no stage lies between them.
    """
    _check_interval("guidance_interval", start, stop)
    first, end = math.ceil(start * plan.stages), math.ceil(stop * plan.stages)
    if first == end:
        raise RequestError(
            f"guidance_interval: none of {plan.stages} stages lies from {start:g} to {stop:g}; "
            "use guidance 1 for no guidance"
        )
    return _between(plan, first, end)


def skipping_stages(plan: SamplingPlan, start: float, stop: float) -> Array:
    """Tell at which stages layers are skipped too, from one fraction of a plan to another: (K,) bool, maybe none.

    start, stop: 0 to 1; stage k of K is one of them when K * start < k < K * stop, as in diffusers'
        StableDiffusion3Pipeline, and so is every stage at a timestep between theirs
    Raises RequestError when they are not in order.
    """
    _check_interval("skip_layer_interval", start, stop)
    first, end = math.floor(start * plan.stages) + 1, math.ceil(stop * plan.stages)
    return _between(plan, first, end) if first < end else np.zeros(plan.stages, dtype=bool)


def _check_interval(name: str, start: float, stop: float) -> None:
    if not 0 <= start < stop <= 1:
        raise RequestError(f"{name}: found {start:g} to {stop:g}, expected 0 <= start < stop <= 1")


def _between(plan: SamplingPlan, first: int, end: int) -> Array:
    """Tell which stages are at timesteps between those of some: (K,) bool."""
    inside = plan.timesteps[first:end]
    return np.asarray((plan.timesteps >= inside.min()) & (plan.timesteps <= inside.max()))


def guidance_rows(
    weights: Array, rows: int, *, slots: Array | None = None, shares: Array | None = None
) -> tuple[Array, Array]:
    """Return G of `output = G @ rows` and the slot of each row, for one stage of the pictures in P slots.

    weights: (groups, P), of each picture's prompt, of its negative prompt, …; 0 where it has no part
    rows: how many there are, a group at least: group after group, then ones without a weight
    slots: (N,) int64, that of each row of a group, each slot's own where None
    shares: (N,), what each of these says of its picture, all of it where None
    returns: (P, rows) float32 and (rows,) int64
    """
    own = np.arange(weights.shape[1], dtype=np.int64) if slots is None else slots
    spread = (weights[:, own] * (1 if shares is None else shares)).reshape(-1)
    owners, flat = np.resize(own, rows), np.zeros(max(rows, spread.size), dtype=np.float32)
    flat[: spread.size] = spread
    matrix = np.zeros((weights.shape[1], rows), dtype=np.float32)
    matrix[owners, np.arange(rows)] = flat[:rows]
    return matrix, owners
