"""The discretizations of a flow, arXiv:2209.03003, where latents are (1 - sigma) * picture + sigma * noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from latentrt.engines.bundle.training import FlowShift, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.schedule import Interval, Level
from latentrt.runtime.sampling.spacings import SPACINGS, Ends
from latentrt.runtime.sampling.timesteps import Convention, Discretization, RequestedSteps, make_discretization

FLOW = "flow_prediction"
ALMOST = 1e-6  # a solver in lambda cannot start from noise alone, where lambda is infinite
UNSHIFTED = FlowShift()


def is_flow(schedule: TrainingSchedule) -> bool:
    """Tell whether a model was trained as a flow."""
    return schedule.prediction_type == FLOW


def flow_level(sigma: float) -> Level:
    """Return the level of a flow with this share of noise."""
    return Level(1 - sigma, sigma)


def shift_for(schedule: TrainingSchedule, tokens: int | None) -> float:
    """Return how far a checkpoint's steps are shifted towards the noise.

    tokens: how many patches the picture has
    Raises RequestError if the shift depends on them and they are not given.
    """
    flow = schedule.flow or UNSHIFTED
    if flow.dynamic is None:
        return flow.shift if schedule.sampler is None else schedule.sampler.shift or flow.shift
    if tokens is None:
        raise RequestError("shift: missing, and this checkpoint's depends on the size of the picture; give it")
    line = flow.dynamic
    share = (tokens - line.base_tokens) / (line.max_tokens - line.base_tokens)
    mu = line.base_shift + share * (line.max_shift - line.base_shift)
    return math.exp(mu) if line.kind == "exponential" else mu


def discretize_flow(schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention) -> Discretization:
    """Return the steps of a flow: its sampler's own sigmas, shifted as in arXiv:2403.03206, eq. 23, or those given.

    What is given, sigmas or timesteps, is shifted only if the request says how far.
    """
    total, shift = schedule.num_train_timesteps, requested.shift or 1.0
    if requested.sigmas is not None:
        sigmas = shifted(_shares(requested.sigmas), shift)
    else:
        given = None if requested.timesteps is None else np.array(requested.timesteps, dtype=np.float64) / total
        starts = _spaced(schedule, requested, convention) if given is None else shifted(given, shift)
        lowest = shifted(np.array(1 / total), shift).item()
        sigmas = np.append(starts, {"zero": 0.0, "lowest": lowest, "repeat": starts[-1]}[convention.end])
    sigmas[0] = min(sigmas[0], convention.most)
    timesteps = np.trunc(sigmas[:-1] * total) if convention.whole else sigmas[:-1].astype(np.float32) * total
    levels = [flow_level(float(sigma)) for sigma in sigmas.astype(np.float32)]
    intervals = tuple(map(Interval, (float(t) for t in timesteps), levels, levels[1:]))
    grid = make_discretization(intervals, schedule, requested)
    return msgspec.structs.replace(grid, flow=True, level=flow_level, timestep_at=lambda sigma: sigma * total)


def _shares(given: Sequence[float]) -> Array:
    sigmas = np.array(given, dtype=np.float64)
    if sigmas.max() > 1:
        raise RequestError(f"sigmas: found {sigmas.max():g}, expected at most 1: those of a flow are shares of noise")
    return sigmas


def _spaced(schedule: TrainingSchedule, requested: RequestedSteps, convention: Convention) -> Array:
    """Return the sigmas of a number of steps, the one at the end left out: (steps,), float64."""
    flow, total = schedule.flow or UNSHIFTED, schedule.num_train_timesteps
    shift = requested.shift or 1.0
    assert convention.flow is not None  # `make` asks only samplers that have one
    sigmas = shifted(convention.flow(requested.steps, total, 1.0 if flow.dynamic else shift), shift)
    if flow.terminal is not None:
        sigmas = 1 - (1 - sigmas) * (1 - flow.terminal) / (1 - sigmas[-1])
    if requested.spacing is None:
        return np.asarray(sigmas)
    table = shifted(np.arange(1, total + 1) / total, shift)
    return SPACINGS[requested.spacing](Ends(float(sigmas[0]), float(sigmas[-1]), table), requested.steps)


def shifted(sigmas: Array, shift: float) -> Array:
    """Return sigmas moved towards the noise: their shape, float64."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas), dtype=np.float64)


# What follows places the sigmas of a flow before they are shifted, each as a class of diffusers does, of (steps, T,
# the shift of training): (steps,), float64.


def matched(steps: int, total: int, shift: float) -> Array:
    """Return sigmas evenly from 1 to the least of training, which is shifted already, as are the classes for flows."""
    return np.linspace(1.0, shifted(np.array(1 / total), shift).item(), steps)


def even(steps: int, total: int, _: float) -> Array:
    """Return sigmas from 1 - 1 / total evenly towards 0, which is left out."""
    # written so because the timesteps are truncated: (1 - 1 / 3) * 1000 must fall on the reference's side of 666
    return np.flip(1 - np.linspace(1, 1 / total, steps + 1))[:-1].copy()


def full(steps: int, total: int, _: float) -> Array:
    """Return sigmas from 1 evenly towards 1 / total, which is left out."""
    return np.linspace(1, 1 / total, steps + 1)[:-1]
