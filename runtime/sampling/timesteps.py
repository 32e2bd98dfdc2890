"""Discretizations: the timesteps and noise levels that a sampler visits; here, those on whole training timesteps.

The conventions are those of diffusers, scheduler by scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import msgspec
import numpy as np

from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.schedule import (
    CLEAN,
    Interval,
    Level,
    alphas_cumprod,
    level_at,
    sigma_to_timestep,
    spaced,
    training_sigmas,
    ve_level,
    vp_level,
)

LEADING = "leading"  # diffusers' default where timesteps are whole
FEW = 15  # with fewer intervals than this the last ones are of lower order, as the authors advise for stability
CONSISTENCY_STEPS = 50  # latent consistency models are distilled on every 20th of 1000 timesteps


class RequestedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """The steps that were asked for: how many and how spaced, or the timesteps or sigmas themselves."""

    steps: int
    spacing: str | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None  # of a flow's steps, towards the noise; None leaves what was given as it is


class Convention(msgspec.Struct, frozen=True, kw_only=True):
    """How a sampler places its steps. What a checkpoint's own scheduler can set has the names of `OwnSampler`."""

    level: Callable[[float], Level] = vp_level
    extra: bool = True  # space one more timestep than there are steps, and drop the last one
    whole: bool = True  # the model gets whole timesteps
    rounds_karras: bool = False  # whole timesteps with Karras sigmas only
    truncates_cosine: bool = False  # truncate, not round, for Karras sigmas on a cosine schedule
    end: Literal["zero", "lowest", "repeat"] = "zero"  # repeat: with a sigma spacing, the last sigma again
    fixed_spacing: Literal["linspace"] | None = None  # this family ignores the checkpoint's timestep spacing
    flow: Callable[[int, int, float], Array] | None = None  # its sigmas of a flow before they are shifted, see `flows`
    most: float = 1.0  # the sigma of a flow that it can start from
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    interpolation: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    lambda_min: float = -math.inf
    original_inference_steps: int = CONSISTENCY_STEPS


class TrainingLevels(msgspec.Struct, frozen=True, kw_only=True):
    """The noise levels of whole training timesteps; below timestep 0 comes the final level."""

    alphas_cumprod: Array  # (T,), float64
    final: Level

    def __call__(self, timestep: int) -> Level:
        """Return the level at a timestep. Past the end, which an offset can reach, it is the last one."""
        last = len(self.alphas_cumprod) - 1
        return level_at(float(self.alphas_cumprod[min(timestep, last)])) if timestep >= 0 else self.final


def training_levels(schedule: TrainingSchedule, *, final_is_clean: bool) -> TrainingLevels:
    """Return the levels at a schedule's timesteps."""
    alphas = alphas_cumprod(schedule).astype(np.float64)
    return TrainingLevels(alphas_cumprod=alphas, final=CLEAN if final_is_clean else level_at(float(alphas[0])))


class Discretization(msgspec.Struct, frozen=True, kw_only=True):
    """All intervals of a sampler, and which of them are taken: from an image, only the later ones."""

    intervals: tuple[Interval, ...]
    initial_scale: float  # of the first latents, in units of noise
    at: TrainingLevels  # the level at any training timestep
    timestep_at: Callable[[float], float]  # what the model gets for a sigma between those of the intervals
    level: Callable[[float], Level]  # the level at that sigma, of samplers that count in it
    stride: int  # T // steps
    flow: bool = False  # the model takes latents as they are, not of unit variance
    begin: int = 0
    end: int = 0

    def __iter__(self) -> Iterator[tuple[int, Interval]]:
        """Yield the intervals to take, each with its number among all of them."""
        return iter(list(enumerate(self.intervals))[self.begin : self.end])

    def order(self, k: int, highest: int, *, few: float = math.inf) -> int:
        """Return the order that a multistep solver may have at interval k: by its history, and less towards the end.

        few: lower it towards the end only where there are fewer intervals than this
        """
        known = k - self.begin + 1
        ahead = len(self.intervals) - k if len(self.intervals) < few else highest
        return min(highest, known, ahead)

    def timestep_after(self, k: int) -> float:
        """Return what the model gets at the end of interval k, for samplers that count in sigma."""
        if k + 1 < len(self.intervals):
            return self.intervals[k + 1].timestep
        return self.timestep_at(self.intervals[k].there.sigma)

    def seen(self, x: Array, here: Level) -> Array:
        """Return latents of samplers that count in sigma as the model takes them."""
        return x if self.flow else x / here.size

    def part(self, begin: int, end: int) -> Discretization:
        """Return the same intervals with another part of them to take; noise to start from has that level's size."""
        scale = self.initial_scale if begin == 0 else self.intervals[begin].here.size
        return msgspec.structs.replace(self, begin=begin, end=end, initial_scale=scale)


def discretize_strided(schedule: TrainingSchedule, requested: RequestedSteps, _: Convention) -> Discretization:
    """Return DDIM's steps: each goes T // steps timesteps down, wherever the next one starts."""
    levels = training_levels(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = whole_timesteps(schedule, requested)
    stride = schedule.num_train_timesteps // requested.steps
    before = [t - stride for t in timesteps] if requested.timesteps is None else [*timesteps[1:], -1]
    intervals = tuple(Interval(float(t), levels(t), levels(b)) for t, b in zip(timesteps, before, strict=True))
    return make_discretization(intervals, schedule, requested)


def discretize_posterior(schedule: TrainingSchedule, requested: RequestedSteps, _: Convention) -> Discretization:
    """Return DDPM's steps: each ends where the next one starts, the last at the clean picture."""
    levels = training_levels(schedule, final_is_clean=True)
    timesteps = whole_timesteps(schedule, requested)
    intervals = tuple(
        Interval(float(t), levels(t), levels(b)) for t, b in zip(timesteps, [*timesteps[1:], -1], strict=True)
    )
    return make_discretization(intervals, schedule, requested)


def discretize_distilled(
    schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention, *, last: int | None
) -> Discretization:
    """Return a consistency model's steps, on the timesteps of its distillation.

    last: the timestep after the last one; None repeats the last one
    """
    levels = training_levels(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = [int(t) for t in requested.timesteps or ()] or _distilled(
        schedule, requested.steps, convention.original_inference_steps
    )
    after = [*timesteps[1:], timesteps[-1] if last is None else last]
    intervals = tuple(Interval(float(t), levels(t), levels(b)) for t, b in zip(timesteps, after, strict=True))
    return make_discretization(intervals, schedule, requested)


def _distilled(schedule: TrainingSchedule, steps: int, original: int) -> list[int]:
    if steps > original:
        raise RequestError(f"steps: found {steps}, expected 1 to {original} for a consistency sampler")
    stride = schedule.num_train_timesteps // original
    index = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return [int(t) for t in (original - index) * stride - 1]


def whole_timesteps(schedule: TrainingSchedule, requested: RequestedSteps) -> list[int]:
    """Return the training timesteps of samplers that know no others, decreasing."""
    if requested.timesteps is not None:
        return [int(t) for t in requested.timesteps]
    total = schedule.num_train_timesteps
    timesteps = np.round(
        spaced(schedule.timestep_spacing or LEADING, total, requested.steps, offset=schedule.steps_offset)
    )
    return [int(t) for t in timesteps.clip(0, total - 1)]


def make_discretization(
    intervals: tuple[Interval, ...],
    schedule: TrainingSchedule,
    requested: RequestedSteps,
    *,
    initial_scale: float = 1.0,
    unit: float | None = None,
) -> Discretization:
    """Return a discretization that takes all of these intervals.

    unit: of the sigmas, where the model gets log(sigma) / 4 instead of a training timestep
    """
    timestep_at = partial(_timestep_in, training_sigmas(schedule)) if unit is None else partial(_logarithm, unit)
    return Discretization(
        intervals=intervals,
        initial_scale=initial_scale,
        at=training_levels(schedule, final_is_clean=schedule.set_alpha_to_one),
        timestep_at=timestep_at,
        level=ve_level,
        stride=schedule.num_train_timesteps // requested.steps,
        end=len(intervals),
    )


def _timestep_in(table: Array, sigma: float) -> float:
    return float(sigma_to_timestep(np.array([sigma]), table)[0])


def _logarithm(unit: float, sigma: float) -> float:
    return math.log(sigma * unit) / 4
