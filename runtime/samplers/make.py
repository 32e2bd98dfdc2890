"""From a name and a number of steps to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import Spacing, TrainingSchedule
from latentrt.runtime.plan import SamplingPlan, compile_plan
from latentrt.runtime.samplers.catalogue import SAMPLERS, Sampler
from latentrt.runtime.samplers.names import Name, find
from latentrt.runtime.samplers.ratio_walks import FLOW
from latentrt.runtime.samplers.walks import Course, Walk
from latentrt.runtime.schedules import CLEAN
from latentrt.runtime.spacings import SPACINGS

TIMESTEP_SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")


def make_plan(
    sampler: str,
    schedule: TrainingSchedule,
    *,
    steps: int | None = None,
    spacing: str | None = None,
    strength: float = 1.0,
    stop: float = 1.0,
    eta: float | None = None,
    shift: float = 1.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    clip_sample: bool = False,
    thresholding: bool = False,
) -> SamplingPlan:
    """Compile a sampler to a plan for a checkpoint's training schedule.

    sampler: any name that `find` knows
    steps: may be left out where timesteps or sigmas are given
    spacing: of timesteps (leading, trailing, linspace: instead of the checkpoint's) or of sigmas (karras, ..)
    strength: the share of the steps to take, from the end: less than 1 keeps some of an image; 0 to 1
    stop: the share of the steps after which to stop, leaving noise for another plan to remove; 0 to 1
    eta: the share of fresh noise, where the sampler has that option; 0 to 1
    shift: how far a flow's steps move towards the noise (3 for Stable Diffusion 3)
    timesteps: what to tell the model, decreasing; sigmas: noise over picture, decreasing, with the one to end at
    clip_sample, thresholding: what some checkpoints' configs ask for; neither is linear, so neither can be a plan
    Raises RequestError when the name is unknown or any of this cannot be done.
    """
    _refuse_nonlinear(clip_sample=clip_sample, thresholding=thresholding)
    name = _resolve(sampler, spacing)
    line = SAMPLERS[name.sampler]
    _check_shares(name, line, schedule, strength=strength, stop=stop, eta=eta)
    if spacing in TIMESTEP_SPACINGS:
        schedule = dataclasses.replace(schedule, timestep_spacing=spacing)
    course = _course(name, line, schedule, steps=steps, timesteps=timesteps, sigmas=sigmas, shift=shift)
    options = {} if line.eta is None else {"eta": line.eta if eta is None else eta}
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # compile_plan refuses what is not finite
            walk = _part(line.walk(schedule, course), course.steps, strength=strength, stop=stop)
            stages = list(line.equations(walk, schedule.prediction_type, **options))
    except RequestError:
        raise
    except (ArithmeticError, ValueError) as error:  # a logarithm or a quotient of zero: two levels are the same
        raise RequestError(
            f"{name} cannot walk this checkpoint's noise in {course.steps} steps ({error}); ask for fewer steps"
        ) from None
    end = CLEAN if walk.end == len(walk.legs) else walk.legs[walk.end - 1].there
    return compile_plan(str(name), stages, steps=course.steps, initial_scale=walk.initial_scale, end=end)


def _refuse_nonlinear(**asked: bool) -> None:
    for name, wanted in asked.items():
        if wanted:
            raise RequestError(
                f"{name}: a sampler that clips what the model predicts is not linear, so it cannot be a plan; "
                f"set {name} to false in the checkpoint's scheduler config"
            )


def _resolve(sampler: str, spacing: str | None) -> Name:
    name = find(sampler)
    if spacing is None or spacing in TIMESTEP_SPACINGS:
        return name
    if spacing not in SPACINGS:
        raise RequestError(f"spacing: found '{spacing}', expected one of {', '.join((*TIMESTEP_SPACINGS, *SPACINGS))}")
    if name.spacing not in (None, spacing):
        raise RequestError(f"spacing: found '{spacing}', but '{sampler}' names another")
    if not SAMPLERS[name.sampler].spaced:
        raise RequestError(f"spacing: {name.sampler} walks its own timesteps and cannot follow '{spacing}'")
    return Name(name.sampler, spacing)


def _check_shares(
    name: Name, line: Sampler, schedule: TrainingSchedule, *, strength: float, stop: float, eta: float | None
) -> None:
    for option, value in (("strength", strength), ("stop", stop), ("eta", 0.0 if eta is None else eta)):
        if not 0 <= value <= 1:
            raise RequestError(f"{option}: found {value}, expected 0 to 1")
    if eta is not None and line.eta is None:
        raise RequestError(f"eta: {name} takes none; ddim and tcd do")
    if name.spacing is not None and str(schedule.prediction_type) in FLOW:
        raise RequestError(f"spacing: '{name.spacing}' spaces the noise of a diffusion, not of a flow; use shift")
    if str(schedule.prediction_type) not in line.predictions:
        expected = " or ".join(line.predictions)
        raise RequestError(
            f"{name} needs a model that predicts {expected}; this one predicts {schedule.prediction_type}"
        )


def _course(
    name: Name,
    line: Sampler,
    schedule: TrainingSchedule,
    *,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    shift: float,
) -> Course:
    _check_given(name, line, schedule, timesteps=timesteps, sigmas=sigmas)
    if not 0 < shift < np.inf or (shift != 1 and str(schedule.prediction_type) not in FLOW):
        raise RequestError(f"shift: found {shift}, expected a positive number, and 1 where the model is not of a flow")
    given = len(timesteps) if timesteps is not None else len(sigmas) - 1 if sigmas is not None else steps
    if given is None:
        raise RequestError("steps: missing, expected a number of steps (or timesteps, or sigmas)")
    if steps is not None and steps != given:
        raise RequestError(f"steps: found {steps}, expected {given} as timesteps or sigmas have")
    if type(given) is not int or not 1 <= given <= schedule.num_train_timesteps:
        raise RequestError(f"steps: found {given}, expected 1 to {schedule.num_train_timesteps}")
    return Course(
        steps=given,
        spacing=name.spacing,
        timesteps=None if timesteps is None else tuple(timesteps),
        sigmas=None if sigmas is None else tuple(sigmas),
        shift=shift,
    )


def _check_given(
    name: Name,
    line: Sampler,
    schedule: TrainingSchedule,
    *,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> None:
    asked = [
        n for n, v in (("timesteps", timesteps), ("sigmas", sigmas), (name.spacing, name.spacing)) if v is not None
    ]
    if len(asked) > 1:
        raise RequestError(f"{asked[0]}: it and `{asked[1]}` each say where to step; give one of them")
    if timesteps is not None:
        if not line.timed or str(schedule.prediction_type) in FLOW:
            raise RequestError(f"timesteps: {name} walks its own here")
        _check_falling("timesteps", timesteps, low=0, high=schedule.num_train_timesteps - 1)
    if sigmas is not None:
        if not line.measured:
            raise RequestError(f"sigmas: {name} walks whole timesteps; give `timesteps`")
        _check_falling("sigmas", sigmas, low=0, high=np.inf)


def _check_falling(name: str, values: Sequence[float], *, low: float, high: float) -> None:
    array = np.array(values, dtype=np.float64)
    inside = bool(np.all((array >= low) & (array <= high) & np.isfinite(array)))
    if array.ndim != 1 or not inside or not bool(np.all(np.diff(array) < 0)):
        raise RequestError(f"{name}: expected finite numbers that decrease, from {high:g} at most to {low:g} at least")


def _part(walk: Walk, steps: int, *, strength: float, stop: float) -> Walk:
    begin = len(walk.legs) - min(int(steps * strength), len(walk.legs))
    end = round(stop * len(walk.legs))
    if begin >= end:
        raise RequestError(
            f"strength: {strength:g} and a `stop` of {stop:g} leave none of {steps} steps to take; "
            "raise one of the three"
        )
    return walk.part(begin, end)
