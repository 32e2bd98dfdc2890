"""The walks of samplers that count in ratios of noise to picture, or in a flow's shares of noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from latentrt.engines.bundle.manifest import EdmRange, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.schedule import Leg, Level, sigma_to_timestep, spaced, training_sigmas, ve_level
from latentrt.runtime.sampling.spacings import BY_FORMULA, SPACINGS, Ends
from latentrt.runtime.sampling.timesteps import Course, Habits, Walk, make_walk

FLOW = ("flow_prediction",)
ALMOST = 1e-6  # a solver in lambda cannot start from noise alone, where lambda is infinite


SIGMA = Habits(level=ve_level, extra=False, whole=False)


def ratio_walk(schedule: TrainingSchedule, course: Course, habits: Habits) -> Walk:
    """Walk the way of the samplers that count in ratios of noise to picture: all that came after DDIM and PNDM."""
    if str(schedule.prediction_type) in FLOW and habits.flow is not None:
        return _solver_flow_walk(schedule, course, habits, habits.flow)
    unit = _unit(schedule, habits)
    timesteps, ratios = (
        _edm_stations(schedule.edm, course, habits) if schedule.edm else _stations(schedule, course, habits)
    )
    rounded = [float(ratio) for ratio in ratios.astype(np.float32)]  # float32: as the reference keeps them
    levels = [habits.level(ratio) for ratio in rounded]
    legs = tuple(map(Leg, (float(t) for t in timesteps), levels, levels[1:]))
    scale = _first_scale(schedule, levels[0], max(rounded[:-1]))
    return make_walk(legs, schedule, course, initial_scale=scale, unit=unit)


def _unit(schedule: TrainingSchedule, habits: Habits) -> float | None:
    if schedule.edm is not None:
        return schedule.edm.sigma_data
    return 1.0 if habits.timestep_type == "continuous" else None


def _first_scale(schedule: TrainingSchedule, first: Level, highest: float) -> float:
    """Return how large the first latents are, in units of noise: by the reference, not always the level's size."""
    if schedule.edm is not None:  # of unit variance with the picture's, before the latents count in sigma_data
        return first.alpha * math.hypot(highest, 1 / schedule.edm.sigma_data)
    if first.alpha < 1:
        return 1.0
    return math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest


def _stations(schedule: TrainingSchedule, course: Course, habits: Habits) -> tuple[Array, Array]:
    """Return what the model is told, (K,), and the ratios with the one at the end, (K + 1,)."""
    table = training_sigmas(schedule)
    if course.sigmas is not None:
        ratios = np.array(course.sigmas, dtype=np.float32).astype(np.float64)
        return _told(ratios[:-1], table, None, schedule, habits), ratios
    timesteps = _timesteps(schedule, course, habits)
    ratios = np.interp(timesteps, np.arange(len(table)), table)
    if habits.interpolation == "log_linear":
        ratios = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), course.steps + 1))
    if course.spacing is not None:
        ends = (
            _ends(table[-1], table[0], table, habits) if habits.whole else _ends(ratios[0], ratios[-1], table, habits)
        )
        ratios = SPACINGS[course.spacing](ends, course.steps)
        timesteps = _told(ratios, table, course.spacing, schedule, habits)
    elif habits.timestep_type == "continuous":
        timesteps = np.log(ratios[: len(timesteps)]) / 4
    last = {"zero": 0.0, "lowest": float(table[0]), "repeat": float(ratios[-1] if course.spacing else table[0])}
    return timesteps, np.append(ratios, last[habits.end])[: len(timesteps) + 1]


def _ends(high: float, low: float, table: Array, habits: Habits) -> Ends:
    high = float(high if habits.sigma_max is None else habits.sigma_max)
    return Ends(high, float(low if habits.sigma_min is None else habits.sigma_min), table, habits.rho)


def _edm_stations(edm: EdmRange, course: Course, habits: Habits) -> tuple[Array, Array]:
    """Return the same of a model that brings its own noise: the ratios are in units of its sigma_data."""
    if course.sigmas is not None:
        ratios = np.array(course.sigmas, dtype=np.float64)
        return np.log(ratios[:-1]) / 4, ratios / edm.sigma_data
    spacing = course.spacing or "karras"
    if spacing not in BY_FORMULA:
        raise RequestError(f"spacing: '{spacing}' counts training timesteps, and this checkpoint has none; use karras")
    ratios = SPACINGS[spacing](Ends(edm.sigma_max, edm.sigma_min, np.empty(0), habits.rho), course.steps)
    last = {"zero": 0.0, "lowest": edm.sigma_min, "repeat": ratios[-1]}[habits.end]
    return np.log(ratios) / 4, np.append(ratios, last) / edm.sigma_data


def _timesteps(schedule: TrainingSchedule, course: Course, habits: Habits) -> Array:
    if course.timesteps is not None:
        given = np.array(course.timesteps, dtype=np.float32)
        return np.trunc(given) if habits.whole else given
    spacing = habits.fixed_spacing or schedule.timestep_spacing or "linspace"  # diffusers' default here
    count = course.steps + (habits.extra and spacing != "trailing")
    total, offset = schedule.num_train_timesteps, 0 if habits.fixed_spacing else schedule.steps_offset
    visited = total - _too_noisy(schedule, habits.lambda_min)
    timesteps = spaced(spacing, total, count, offset=offset, visited=visited)[: course.steps]
    return np.round(timesteps) if habits.whole else timesteps.astype(np.float32)


def _too_noisy(schedule: TrainingSchedule, lambda_min: float) -> int:
    """Return how many training timesteps have a half-log-SNR below a bound."""
    return int(np.count_nonzero(-np.log(training_sigmas(schedule)) < lambda_min))


def _told(ratios: Array, table: Array, spacing: str | None, schedule: TrainingSchedule, habits: Habits) -> Array:
    """Return what the model is told of ratios: the reference truncates some timesteps and rounds others."""
    if habits.timestep_type == "continuous":
        return np.asarray(np.log(ratios) / 4)
    timesteps = sigma_to_timestep(ratios, table)
    if not habits.whole:
        return np.round(timesteps) if habits.rounds_karras and spacing == "karras" else timesteps
    cosine = habits.truncates_cosine and schedule.beta_schedule == "squaredcos_cap_v2"
    if spacing in ("exponential", "beta") or (spacing in ("karras", "lu") and cosine):
        return np.trunc(timesteps)
    return np.round(timesteps)


def flow_walk(schedule: TrainingSchedule, course: Course, _: Habits) -> Walk:
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
