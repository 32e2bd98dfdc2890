"""A walk is the timesteps and noise levels that a sampler visits; here are those on whole training timesteps.

The conventions are diffusers', scheduler by scheduler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentrt.engines.bundle.manifest import TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.schedule import (
    CLEAN,
    Leg,
    Level,
    alpha_bars,
    bar_level,
    sigma_to_timestep,
    spaced,
    training_sigmas,
    vp_level,
)

LEADING = "leading"  # diffusers' default where timesteps are whole
CONSISTENCY_STEPS = 50  # latent consistency models are distilled on every 20th of 1000 timesteps


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What was asked about the way: a number of steps and a spacing, or the timesteps or ratios themselves."""

    steps: int
    spacing: str | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float = 1.0  # of a flow's steps towards the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a sampler walks, beside its equations. What a checkpoint's own scheduler sets has `OwnSampler`'s names."""

    level: Callable[[float], Level] = vp_level
    extra: bool = True  # space one timestep more than steps and leave the last one out
    whole: bool = True  # tell the model whole timesteps
    rounds_karras: bool = False  # tell whole timesteps with Karras ratios only
    truncates_cosine: bool = False  # with Karras ratios on a cosine schedule, truncate where others round
    end: Literal["zero", "lowest", "repeat"] = "zero"  # repeat: with a sigma spacing, the last ratio again
    fixed_spacing: Literal["linspace"] | None = None  # this family ignores the checkpoint's timestep spacing
    flow: Callable[[int, int], Array] | None = None  # its sigmas of a flow, of (steps, T), before they are shifted
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    interpolation: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    lambda_min: float = -math.inf
    original_inference_steps: int = CONSISTENCY_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """The levels of whole training timesteps: below 0 comes the final one."""

    levels: Array  # (T,), alpha-bar, float64
    final: Level

    def __call__(self, timestep: int) -> Level:
        """Return the level at a timestep. One past the end, which an offset can reach, is the last."""
        return bar_level(float(self.levels[min(timestep, len(self.levels) - 1)])) if timestep >= 0 else self.final


def bars_of(schedule: TrainingSchedule, *, final_is_clean: bool) -> Bars:
    """Return the levels at a schedule's timesteps."""
    levels = alpha_bars(schedule).astype(np.float64)
    return Bars(levels=levels, final=CLEAN if final_is_clean else bar_level(float(levels[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """The whole way of a sampler, and the part of it that is taken (from an image it is the latter part)."""

    legs: tuple[Leg, ...]
    initial_scale: float  # of the first latents, in units of noise
    table: Array  # the training ratios, increasing: (T,), float32
    at: Bars  # the level at any training timestep
    stride: int  # T // steps
    unit: float | None = None  # of the ratios, where the model is told log(sigma) / 4 and no training timestep
    begin: int = 0
    end: int = 0

    def __iter__(self) -> Iterator[tuple[int, Leg]]:
        """Yield the legs to take with their number on the whole way."""
        return iter(list(enumerate(self.legs))[self.begin : self.end])

    def order(self, k: int, highest: int, *, few: float = math.inf) -> int:
        """Return the order a multistep solver may have at leg k: what history it has, and less towards the end.

        few: lower it towards the end only on ways of fewer legs than this
        """
        known = k - self.begin + 1
        ahead = len(self.legs) - k if len(self.legs) < few else highest
        return min(highest, known, ahead)

    def timestep_at(self, sigma: float) -> float:
        """Return what the model is told of a ratio of noise to picture: a timestep with its fraction, or a log."""
        if self.unit is not None:
            return math.log(sigma * self.unit) / 4
        return float(sigma_to_timestep(np.array([sigma]), self.table)[0])

    def part(self, begin: int, end: int) -> Walk:
        """Return the same way with another part of it to take; noise to start from there has that level's size."""
        scale = self.initial_scale if begin == 0 else self.legs[begin].here.size
        return dataclasses.replace(self, begin=begin, end=end, initial_scale=scale)


def stride_walk(schedule: TrainingSchedule, course: Course, _: Habits) -> Walk:
    """Walk DDIM's way: every step goes T // steps timesteps down, wherever the next one starts."""
    bars = bars_of(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = whole_timesteps(schedule, course)
    stride = schedule.num_train_timesteps // course.steps
    before = [t - stride for t in timesteps] if course.timesteps is None else [*timesteps[1:], -1]
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, before, strict=True))
    return make_walk(legs, schedule, course)


def posterior_walk(schedule: TrainingSchedule, course: Course, _: Habits) -> Walk:
    """Walk DDPM's way: every step ends where the next one starts, the last at the clean picture."""
    bars = bars_of(schedule, final_is_clean=True)
    timesteps = whole_timesteps(schedule, course)
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, [*timesteps[1:], -1], strict=True))
    return make_walk(legs, schedule, course)


def consistency_walk(schedule: TrainingSchedule, course: Course, habits: Habits, *, last: int | None) -> Walk:
    """Walk a consistency model's way, on the timesteps of its distillation.

    last: the timestep after the last one; None repeats the last one
    """
    bars = bars_of(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = [int(t) for t in course.timesteps or ()] or _distilled(
        schedule, course.steps, habits.original_inference_steps
    )
    after = [*timesteps[1:], timesteps[-1] if last is None else last]
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, after, strict=True))
    return make_walk(legs, schedule, course)


def _distilled(schedule: TrainingSchedule, steps: int, original: int) -> list[int]:
    if steps > original:
        raise RequestError(f"steps: found {steps}, expected 1 to {original} for a consistency sampler")
    stride = schedule.num_train_timesteps // original
    index = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return [int(t) for t in (original - index) * stride - 1]


def whole_timesteps(schedule: TrainingSchedule, course: Course) -> list[int]:
    """Return the training timesteps of samplers that know only those, decreasing."""
    if course.timesteps is not None:
        return [int(t) for t in course.timesteps]
    total = schedule.num_train_timesteps
    timesteps = np.round(
        spaced(schedule.timestep_spacing or LEADING, total, course.steps, offset=schedule.steps_offset)
    )
    return [int(t) for t in timesteps.clip(0, total - 1)]


def make_walk(
    legs: tuple[Leg, ...],
    schedule: TrainingSchedule,
    course: Course,
    *,
    initial_scale: float = 1.0,
    unit: float | None = None,
) -> Walk:
    """Return a walk that takes all of these legs."""
    return Walk(
        legs=legs,
        initial_scale=initial_scale,
        table=training_sigmas(schedule),
        at=bars_of(schedule, final_is_clean=schedule.set_alpha_to_one),
        stride=schedule.num_train_timesteps // course.steps,
        unit=unit,
        end=len(legs),
    )


FEW = 15  # on ways with fewer legs the last ones are of lower order, as the authors advise for stability
