"""The walks: which timesteps and noise levels each family of samplers visits, in diffusers' conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from latentrt.engines.manifest import TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.schedules import (
    CLEAN,
    Leg,
    Level,
    alpha_bars,
    bar_level,
    karras,
    sigma_to_timestep,
    spaced,
    training_sigmas,
    ve_level,
    vp_level,
)


class Walk(NamedTuple):
    """The steps to take, and how large the first latents are in units of noise."""

    legs: tuple[Leg, ...]
    initial_scale: float


def alpha_bar_walk(schedule: TrainingSchedule, steps: int, spacing: str | None) -> Walk:
    """Walk DDIM's way: every step goes T // steps timesteps down, wherever the next one starts."""
    total = schedule.num_train_timesteps
    bars = alpha_bars(schedule).astype(np.float64)
    final = CLEAN if schedule.set_alpha_to_one else bar_level(bars[0])
    timesteps = np.round(spaced(schedule.timestep_spacing, total, steps, offset=schedule.steps_offset))
    legs = []
    for t in timesteps.clip(0, total - 1).astype(int):
        before = t - total // steps
        legs.append(Leg(float(t), bar_level(bars[t]), bar_level(bars[before]) if before >= 0 else final))
    return Walk(tuple(legs), 1.0)


def sigma_walk(schedule: TrainingSchedule, steps: int, spacing: str | None) -> Walk:
    """Walk the Euler family's way: latents are picture + sigma * noise, timesteps may be fractions."""
    table = training_sigmas(schedule)
    timesteps = spaced(schedule.timestep_spacing, len(table), steps, offset=schedule.steps_offset)
    timesteps = timesteps.astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if spacing == "karras":
        sigmas = karras(sigmas[0], sigmas[-1], steps)
        timesteps = sigma_to_timestep(sigmas, table)
    highest = float(np.float32(sigmas.max()))
    start = math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest
    return Walk(_chain(timesteps, sigmas, ve_level), start)


def dpm_walk(schedule: TrainingSchedule, steps: int, spacing: str | None) -> Walk:
    """Walk DPM-Solver's way: whole timesteps, one more of them than steps with the last one left out."""
    table = training_sigmas(schedule)
    if spacing == "karras":
        sigmas = karras(float(table[-1]), float(table[0]), steps)
        timesteps = sigma_to_timestep(sigmas, table)
        if schedule.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
    else:
        timesteps = _dpm_timesteps(schedule, steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
    return Walk(_chain(np.trunc(timesteps), sigmas, vp_level), 1.0)


def _dpm_timesteps(schedule: TrainingSchedule, steps: int) -> Array:
    count = steps if schedule.timestep_spacing == "trailing" else steps + 1
    timesteps = spaced(
        schedule.timestep_spacing, schedule.num_train_timesteps, count, offset=schedule.steps_offset
    )
    return np.round(timesteps)[:steps]


def _chain(timesteps: Array, sigmas: Array, level: Callable[[float], Level]) -> tuple[Leg, ...]:
    rounded = [
        float(sigma) for sigma in sigmas.astype(np.float32)
    ]  # float32: as the reference keeps its sigmas
    levels: Sequence[Level] = [*map(level, rounded), CLEAN]
    return tuple(map(Leg, (float(t) for t in timesteps), levels, levels[1:]))
