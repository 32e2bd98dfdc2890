"""The walks of samplers that count in ratios of noise to picture, or in a flow's shares of noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.samplers.walks import Course, Walk, make_walk
from latentrt.runtime.schedules import Leg, Level, sigma_to_timestep, spaced, training_sigmas, ve_level, vp_level
from latentrt.runtime.spacings import SPACINGS, Ends, karras

FLOW = ("flow_prediction",)
ALMOST = 1e-6  # a solver in lambda cannot start from noise alone, where lambda is infinite


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
    flow: Callable[[int, int], Array] | None = None  # its sigmas of a flow, of (steps, T), before they are shifted


SIGMA = Habits(level=ve_level, extra=False, whole=False)


def ratio_walk(schedule: TrainingSchedule, course: Course, *, habits: Habits) -> Walk:
    """Walk the way of the samplers that count in ratios of noise to picture: all that came after DDIM and PNDM."""
    if str(schedule.prediction_type) in FLOW and habits.flow is not None:
        return _solver_flow_walk(schedule, course, habits, habits.flow)
    table = training_sigmas(schedule)
    timesteps, ratios = _stations(schedule, course, habits, table)
    rounded = [float(ratio) for ratio in ratios.astype(np.float32)]  # float32: as the reference keeps them
    levels = [habits.level(ratio) for ratio in rounded]
    legs = tuple(map(Leg, (float(t) for t in timesteps), levels, levels[1:]))
    if habits.level is not ve_level:
        return make_walk(legs, schedule, course)
    highest = max(rounded)
    scale = math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest
    return make_walk(legs, schedule, course, initial_scale=scale)


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
    spacing = habits.fixed_spacing or schedule.timestep_spacing or "linspace"  # diffusers' default here
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
    ratios = np.append(karras(Ends(high, low, np.empty(0)), course.steps), 0.0)
    ratios = np.array(ratios if course.sigmas is None else course.sigmas, dtype=np.float32)
    levels = [ve_level(float(ratio)) for ratio in ratios]
    legs = tuple(map(Leg, (float(t) for t in np.log(ratios[:-1]) / 4), levels, levels[1:]))
    return make_walk(legs, schedule, course, initial_scale=math.hypot(high, 1.0))


def flow_walk(schedule: TrainingSchedule, course: Course) -> Walk:
    """Walk rectified flow's way: sigma falls from 1 evenly, shifted towards the noise as arXiv:2403.03206, eq. 23.

    The ends are shifted before the way between them is divided and shifted, as the reference does.
    """
    total = schedule.num_train_timesteps
    high, low = _shifted(np.array([1.0, 1 / total]), course.shift)
    sigmas = np.append(_shifted(np.linspace(high, low, course.steps), course.shift), 0.0)
    levels = _flow_levels(sigmas if course.sigmas is None else np.array(course.sigmas))
    timesteps = [level.sigma * total for level in levels[:-1]]
    return make_walk(tuple(map(Leg, timesteps, levels, levels[1:])), schedule, course)


def _solver_flow_walk(
    schedule: TrainingSchedule, course: Course, habits: Habits, spacing: Callable[[int, int], Array]
) -> Walk:
    """Walk a flow with a solver that was made for diffusion: whole timesteps, and its own ends."""
    total = schedule.num_train_timesteps
    sigmas = _shifted(spacing(course.steps, total), course.shift)
    sigmas[0] = min(sigmas[0], 1 - ALMOST)
    sigmas = np.append(sigmas, 0.0 if habits.end == "zero" else sigmas[-1])
    levels = _flow_levels(sigmas if course.sigmas is None else np.array(course.sigmas))
    timesteps = np.trunc(sigmas[:-1] * total) if course.sigmas is None else [level.sigma * total for level in levels]
    return make_walk(tuple(map(Leg, (float(t) for t in timesteps), levels, levels[1:])), schedule, course)


def even_flow(steps: int, total: int) -> Array:
    """Return sigmas from 1 - 1 / total evenly towards 0, which is left out: (steps,), float64."""
    # so written because the timesteps are truncated: (1 - 1 / 3) * 1000 must fall on the reference's side of 666
    return np.flip(1 - np.linspace(1, 1 / total, steps + 1))[:-1].copy()


def full_flow(steps: int, total: int) -> Array:
    """Return sigmas from 1 evenly towards 1 / total, which is left out: (steps,), float64."""
    return np.linspace(1, 1 / total, steps + 1)[:-1]


def _shifted(sigma: Array, shift: float) -> Array:
    return np.asarray(shift * sigma / (1 + (shift - 1) * sigma), dtype=np.float64)


def _flow_levels(sigmas: Array) -> list[Level]:
    if sigmas.max() > 1:
        raise RequestError(f"sigmas: found {sigmas.max():g}, expected 1 at most: those of a flow are shares of noise")
    return [Level(1 - float(sigma), float(sigma)) for sigma in sigmas.astype(np.float32)]
