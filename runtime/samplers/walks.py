"""The walks: which timesteps and noise levels each family of samplers visits, in diffusers' conventions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.schedules import (
    CLEAN,
    Leg,
    Level,
    alpha_bars,
    bar_level,
    sigma_to_timestep,
    spaced,
    training_sigmas,
    ve_level,
    vp_level,
)
from latentrt.runtime.spacings import SPACINGS, Ends, karras

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
    begin: int = 0
    end: int = 0

    def __iter__(self) -> Iterator[tuple[int, Leg]]:
        """Yield the legs to take with their number on the whole way."""
        return iter(list(enumerate(self.legs))[self.begin : self.end])

    def order(self, k: int, highest: int, *, few: int | None = None) -> int:
        """Return the order a multistep solver may have at leg k: what history it has, and less towards the end.

        few: lower it towards the end only on ways of fewer legs than this
        """
        known = k - self.begin + 1
        ahead = len(self.legs) - k if few is None or len(self.legs) < few else highest
        return min(highest, known, ahead)

    def timestep_at(self, sigma: float) -> float:
        """Return the timestep, with its fraction, at which training had this ratio of noise to picture."""
        return float(sigma_to_timestep(np.array([sigma]), self.table)[0])

    def part(self, begin: int, end: int) -> Walk:
        """Return the same way with another part of it to take; noise to start from there has that level's size."""
        scale = self.initial_scale if begin == 0 else self.legs[begin].here.size
        return dataclasses.replace(self, begin=begin, end=end, initial_scale=scale)


def stride_walk(schedule: TrainingSchedule, course: Course) -> Walk:
    """Walk DDIM's way: every step goes T // steps timesteps down, wherever the next one starts."""
    bars = bars_of(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = whole_timesteps(schedule, course)
    stride = schedule.num_train_timesteps // course.steps
    before = [t - stride for t in timesteps] if course.timesteps is None else [*timesteps[1:], -1]
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, before, strict=True))
    return _walk(legs, schedule, course)


def posterior_walk(schedule: TrainingSchedule, course: Course) -> Walk:
    """Walk DDPM's way: every step ends where the next one starts, the last at the clean picture."""
    bars = bars_of(schedule, final_is_clean=True)
    timesteps = whole_timesteps(schedule, course)
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, [*timesteps[1:], -1], strict=True))
    return _walk(legs, schedule, course)


def consistency_walk(schedule: TrainingSchedule, course: Course, *, last: int | None) -> Walk:
    """Walk a consistency model's way, on the timesteps of its distillation.

    last: the timestep after the last one; None repeats the last one
    """
    bars = bars_of(schedule, final_is_clean=schedule.set_alpha_to_one)
    timesteps = [int(t) for t in course.timesteps or ()] or _distilled(schedule, course.steps)
    after = [*timesteps[1:], timesteps[-1] if last is None else last]
    legs = tuple(Leg(float(t), bars(t), bars(b)) for t, b in zip(timesteps, after, strict=True))
    return _walk(legs, schedule, course)


def _distilled(schedule: TrainingSchedule, steps: int) -> list[int]:
    if steps > CONSISTENCY_STEPS:
        raise RequestError(f"steps: found {steps}, expected 1 to {CONSISTENCY_STEPS} for a consistency sampler")
    stride = schedule.num_train_timesteps // CONSISTENCY_STEPS
    index = np.floor(np.linspace(0, CONSISTENCY_STEPS, steps, endpoint=False)).astype(int)
    return [int(t) for t in (CONSISTENCY_STEPS - index) * stride - 1]


def whole_timesteps(schedule: TrainingSchedule, course: Course) -> list[int]:
    """Return the training timesteps of samplers that know only those, decreasing."""
    if course.timesteps is not None:
        return [int(t) for t in course.timesteps]
    total = schedule.num_train_timesteps
    timesteps = np.round(spaced(schedule.timestep_spacing, total, course.steps, offset=schedule.steps_offset))
    return [int(t) for t in timesteps.clip(0, total - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a family of samplers walks the ratios of noise to picture."""

    level: Callable[[float], Level] = vp_level
    extra: bool = True  # space one timestep more than steps and leave the last one out
    whole: bool = True  # tell the model whole timesteps
    rounds_karras: bool = False  # tell whole timesteps with Karras ratios only
    truncates_cosine: bool = False  # with Karras ratios on a cosine schedule, truncate where others round
    end: Literal["zero", "lowest", "repeat"] = "zero"  # repeat: with a sigma spacing, the last ratio again
    fixed_spacing: Literal["linspace"] | None = None  # this family ignores the checkpoint's timestep spacing


SIGMA = Habits(level=ve_level, extra=False, whole=False)


def ratio_walk(schedule: TrainingSchedule, course: Course, *, habits: Habits) -> Walk:
    """Walk the way of the samplers that count in ratios of noise to picture: all that came after DDIM and PNDM."""
    table = training_sigmas(schedule)
    timesteps, ratios = _stations(schedule, course, habits, table)
    rounded = [float(ratio) for ratio in ratios.astype(np.float32)]  # float32: as the reference keeps them
    levels = [habits.level(ratio) for ratio in rounded]
    legs = tuple(map(Leg, (float(t) for t in timesteps), levels, levels[1:]))
    if habits.level is not ve_level:
        return _walk(legs, schedule, course)
    highest = max(rounded)
    scale = math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest
    return _walk(legs, schedule, course, initial_scale=scale)


def _stations(schedule: TrainingSchedule, course: Course, habits: Habits, table: Array) -> tuple[Array, Array]:
    """Return the timesteps, (K,), and the ratios with the one at the end, (K + 1,)."""
    if course.sigmas is not None:
        ratios = np.array(course.sigmas, dtype=np.float32).astype(np.float64)
        return _told(sigma_to_timestep(ratios[:-1], table), None, schedule, habits), ratios
    timesteps = _timesteps(schedule, course, habits)
    ratios = np.interp(timesteps, np.arange(len(table)), table)
    if course.spacing is not None:
        ends = Ends(float(table[-1]), float(table[0]), table) if habits.whole else Ends(ratios[0], ratios[-1], table)
        ratios = SPACINGS[course.spacing](ends, course.steps)
        timesteps = _told(sigma_to_timestep(ratios, table), course.spacing, schedule, habits)
    last = {"zero": 0.0, "lowest": float(table[0]), "repeat": float(ratios[-1] if course.spacing else table[0])}
    return timesteps, np.append(ratios, last[habits.end])


def _timesteps(schedule: TrainingSchedule, course: Course, habits: Habits) -> Array:
    if course.timesteps is not None:
        given = np.array(course.timesteps, dtype=np.float32)
        return np.trunc(given) if habits.whole else given
    spacing = habits.fixed_spacing or schedule.timestep_spacing
    count = course.steps + (habits.extra and spacing != "trailing")
    timesteps = spaced(spacing, schedule.num_train_timesteps, count, offset=_offset(schedule, habits))[: course.steps]
    return np.round(timesteps) if habits.whole else timesteps.astype(np.float32)


def _offset(schedule: TrainingSchedule, habits: Habits) -> int:
    return 0 if habits.fixed_spacing else schedule.steps_offset


def _told(timesteps: Array, spacing: str | None, schedule: TrainingSchedule, habits: Habits) -> Array:
    """Return what the model is told of timesteps with fractions: the reference truncates some and rounds others."""
    if not habits.whole:
        return np.round(timesteps) if habits.rounds_karras and spacing == "karras" else timesteps
    cosine = habits.truncates_cosine and schedule.beta_schedule == "squaredcos_cap_v2"
    if spacing in ("exponential", "beta") or (spacing == "karras" and cosine):
        return np.trunc(timesteps)
    return np.round(timesteps)


def edm_walk(schedule: TrainingSchedule, course: Course, *, high: float, low: float) -> Walk:
    """Walk Karras ratios of a model that is told log(sigma) / 4 and has no training timesteps."""
    ratios = karras(Ends(high, low, np.empty(0)), course.steps).astype(np.float32)
    if course.sigmas is not None:
        ratios = np.array(course.sigmas[:-1], dtype=np.float32)
    levels = [*(ve_level(float(ratio)) for ratio in ratios), CLEAN]
    legs = tuple(map(Leg, (float(t) for t in np.log(ratios) / 4), levels, levels[1:]))
    return _walk(legs, schedule, course, initial_scale=math.hypot(high, 1.0))


def flow_walk(schedule: TrainingSchedule, course: Course) -> Walk:
    """Walk rectified flow's way: sigma falls from 1 evenly, shifted towards the noise as arXiv:2403.03206, eq. 23.

    The ends are shifted before the way between them is divided and shifted, as the reference does.
    """
    total = schedule.num_train_timesteps

    def shifted(sigma: Array) -> Array:
        return np.asarray(course.shift * sigma / (1 + (course.shift - 1) * sigma))

    high, low = shifted(np.array([1.0, 1 / total]))
    sigmas = np.array(course.sigmas[:-1]) if course.sigmas else shifted(np.linspace(high, low, course.steps))
    levels = [*(Level(1 - float(s), float(s)) for s in sigmas.astype(np.float32)), CLEAN]
    timesteps = [level.sigma * total for level in levels]
    return _walk(tuple(map(Leg, timesteps[:-1], levels, levels[1:])), schedule, course)


def _walk(legs: tuple[Leg, ...], schedule: TrainingSchedule, course: Course, *, initial_scale: float = 1.0) -> Walk:
    return Walk(
        legs=legs,
        initial_scale=initial_scale,
        table=training_sigmas(schedule),
        at=bars_of(schedule, final_is_clean=schedule.set_alpha_to_one),
        stride=schedule.num_train_timesteps // course.steps,
        end=len(legs),
    )
