"""The discretizations of samplers that count in sigma, the ratio of noise to picture; `flows` has those of a flow."""

from __future__ import annotations

import math

import numpy as np

from latentrt.engines.bundle.training import EdmRange, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.schedule import Interval, Level, sigma_to_timestep, spaced, training_sigmas
from latentrt.runtime.sampling.spacings import BY_FORMULA, SPACINGS, Ends
from latentrt.runtime.sampling.timesteps import Convention, Discretization, RequestedSteps, make_discretization


def discretize_sigmas(schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention) -> Discretization:
    """Return the steps of the samplers that count in sigma: all that came after DDIM and PNDM."""
    unit = _unit(schedule, convention)
    timesteps, sigmas = (
        _edm_timesteps_and_sigmas(schedule.edm, requested, convention)
        if schedule.edm
        else _timesteps_and_sigmas(schedule, requested, convention)
    )
    rounded = [float(sigma) for sigma in sigmas.astype(np.float32)]  # float32: as the reference keeps them
    levels = [convention.level(sigma) for sigma in rounded]
    intervals = tuple(map(Interval, (float(t) for t in timesteps), levels, levels[1:]))
    scale = _first_scale(schedule, levels[0], max(rounded[:-1]))
    return make_discretization(intervals, schedule, requested, initial_scale=scale, unit=unit)


def _unit(schedule: TrainingSchedule, convention: Convention) -> float | None:
    if schedule.edm is not None:
        return schedule.edm.sigma_data
    return 1.0 if convention.timestep_type == "continuous" else None


def _first_scale(schedule: TrainingSchedule, first: Level, highest: float) -> float:
    """Return how large the first latents are, in units of noise: as in the reference, not always the level's size."""
    if schedule.edm is not None:  # unit variance with the picture's, before the latents count in sigma_data
        return first.alpha * math.hypot(highest, 1 / schedule.edm.sigma_data)
    if first.alpha < 1:
        return 1.0
    return math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest


def _timesteps_and_sigmas(
    schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention
) -> tuple[Array, Array]:
    """Return what the model gets, (K,), and the sigmas with the one at the end, (K + 1,)."""
    table = training_sigmas(schedule)
    if requested.sigmas is not None:
        sigmas = np.array(requested.sigmas, dtype=np.float32).astype(np.float64)
        return _timesteps_at(sigmas[:-1], table, None, schedule, convention), sigmas
    timesteps = _timesteps(schedule, requested, convention)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if convention.interpolation == "log_linear":
        sigmas = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), requested.steps + 1))
    if requested.spacing is not None:
        ends = (
            _ends(table[-1], table[0], table, convention)
            if convention.whole
            else _ends(sigmas[0], sigmas[-1], table, convention)
        )
        sigmas = SPACINGS[requested.spacing](ends, requested.steps)
        timesteps = _timesteps_at(sigmas, table, requested.spacing, schedule, convention)
    elif convention.timestep_type == "continuous":
        timesteps = np.log(sigmas[: len(timesteps)]) / 4
    last = {"zero": 0.0, "lowest": float(table[0]), "repeat": float(sigmas[-1] if requested.spacing else table[0])}
    return timesteps, np.append(sigmas, last[convention.end])[: len(timesteps) + 1]


def _ends(high: float, low: float, table: Array, convention: Convention) -> Ends:
    high = float(high if convention.sigma_max is None else convention.sigma_max)
    return Ends(high, float(low if convention.sigma_min is None else convention.sigma_min), table, convention.rho)


def _edm_timesteps_and_sigmas(edm: EdmRange, requested: RequestedSteps, convention: Convention) -> tuple[Array, Array]:
    """Return the same for a model with its own noise range: the sigmas are in units of its sigma_data."""
    if requested.sigmas is not None:
        sigmas = np.array(requested.sigmas, dtype=np.float64)
        return np.log(sigmas[:-1]) / 4, sigmas / edm.sigma_data
    spacing = requested.spacing or "karras"
    if spacing not in BY_FORMULA:
        raise RequestError(f"spacing: '{spacing}' counts training timesteps, and this checkpoint has none; use karras")
    sigmas = SPACINGS[spacing](Ends(edm.sigma_max, edm.sigma_min, np.empty(0), convention.rho), requested.steps)
    last = {"zero": 0.0, "lowest": edm.sigma_min, "repeat": sigmas[-1]}[convention.end]
    return np.log(sigmas) / 4, np.append(sigmas, last) / edm.sigma_data


def _timesteps(schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention) -> Array:
    if requested.timesteps is not None:
        given = np.array(requested.timesteps, dtype=np.float32)
        return np.trunc(given) if convention.whole else given
    spacing = convention.fixed_spacing or schedule.timestep_spacing or "linspace"  # diffusers' default here
    count = requested.steps + (convention.extra and spacing != "trailing")
    total, offset = schedule.num_train_timesteps, 0 if convention.fixed_spacing else schedule.steps_offset
    visited = total - _too_noisy(schedule, convention.lambda_min)
    timesteps = spaced(spacing, total, count, offset=offset, visited=visited)[: requested.steps]
    return np.round(timesteps) if convention.whole else timesteps.astype(np.float32)


def _too_noisy(schedule: TrainingSchedule, lambda_min: float) -> int:
    """Return how many training timesteps have a half-log-SNR below a bound."""
    return int(np.count_nonzero(-np.log(training_sigmas(schedule)) < lambda_min))


def _timesteps_at(
    sigmas: Array, table: Array, spacing: str | None, schedule: TrainingSchedule, convention: Convention
) -> Array:
    """Return what the model gets for sigmas: the reference truncates some timesteps and rounds others."""
    if convention.timestep_type == "continuous":
        return np.asarray(np.log(sigmas) / 4)
    timesteps = sigma_to_timestep(sigmas, table)
    if not convention.whole:
        return np.round(timesteps) if convention.rounds_karras and spacing == "karras" else timesteps
    cosine = convention.truncates_cosine and schedule.beta_schedule == "squaredcos_cap_v2"
    if spacing in ("exponential", "beta") or (spacing in ("karras", "lu") and cosine):
        return np.trunc(timesteps)
    return np.round(timesteps)
