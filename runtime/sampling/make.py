"""From a name and a number of steps to a plan."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from latentrt.engines.bundle.training import OwnSampler, Spacing, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.runtime.sampling.catalogue import SAMPLERS, Name, Sampler, choose_sampler
from latentrt.runtime.sampling.flows import discretize_flow, is_flow, shift_for
from latentrt.runtime.sampling.plan import SamplingPlan, compile_plan
from latentrt.runtime.sampling.schedule import CLEAN
from latentrt.runtime.sampling.solvers.prediction import edm_units
from latentrt.runtime.sampling.spacings import SPACINGS
from latentrt.runtime.sampling.timesteps import Discretization, RequestedSteps

TIMESTEP_SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")
NOT_OF_FLOWS = ("lu", "ays", "ays_sdxl")  # even in a diffusion's lambda, and published for its noise


def make_plan(
    sampler: str | None,
    schedule: TrainingSchedule,
    *,
    steps: int | None = None,
    spacing: str | None = None,
    strength: float = 1.0,
    stop: float = 1.0,
    eta: float | None = None,
    shift: float | None = None,
    tokens: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> SamplingPlan:
    """Compile a sampler to a plan for a checkpoint's training schedule.

    sampler: any name that `find` knows; None or `own` for the checkpoint's own scheduler with what its config sets
    steps: may be None if timesteps or sigmas are given
    spacing: of timesteps (leading, trailing, linspace: instead of the checkpoint's) or of sigmas (karras, ..)
    strength: the share of the steps to take, from the end: less than 1 keeps some of an image; 0 to 1
    stop: the share of the steps after which to stop, leaving noise for another plan to remove; 0 to 1
    eta: the share of fresh noise, where the sampler has that option; 0 to 1
    shift: how far a flow's steps move towards the noise, instead of the checkpoint's own; sigmas and timesteps that are
        given move only if it is, too
    tokens: how many patches the picture has, for a flow whose shift depends on that
    timesteps: for the model, decreasing; sigmas: noise over picture, or a flow's shares of noise, decreasing, with the
        one to end at
    Raises RequestError when the name is unknown or any of this cannot be done.
    """
    chosen = choose_sampler(sampler, schedule)
    schedule = _scheduled(schedule, chosen, spacing)
    name = _name(chosen, spacing)
    line = SAMPLERS[name.sampler].tuned(_solver_options(chosen))
    _check_shares(name, line, schedule, strength=strength, stop=stop, eta=eta)
    requested = _requested_steps(name, line, schedule, steps=steps, timesteps=timesteps, sigmas=sigmas)
    requested = msgspec.structs.replace(requested, shift=_shift(schedule, requested, shift, tokens))
    options = {} if line.eta is None else {"eta": line.eta if eta is None else eta}
    prediction = "v_prediction" if schedule.edm else schedule.prediction_type
    discretize = discretize_flow if is_flow(schedule) else line.discretize
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # compile_plan refuses what is not finite
            grid = _part(
                discretize(schedule, requested, line.convention),
                _first(schedule, requested.steps, strength),
                stop=stop,
            )
            stages = list(line.equations(grid, prediction, **options))
    except RequestError:
        raise
    except (ArithmeticError, ValueError) as error:  # a logarithm or a quotient of zero: two levels are the same
        raise RequestError(
            f"steps: {name} cannot follow this checkpoint's noise in {requested.steps} ({error}); ask for fewer"
        ) from None
    end = CLEAN if grid.end == len(grid.intervals) else grid.intervals[grid.end - 1].there
    plan = compile_plan(str(name), stages, steps=requested.steps, initial_scale=grid.initial_scale, end=end)
    return edm_units(plan, schedule) if schedule.edm else plan


def _solver_options(chosen: OwnSampler) -> dict[str, object]:
    """Return what a checkpoint's config sets for the steps and the equations; the rest is read elsewhere."""
    return {name: value for name, value in chosen.options.items() if name not in ("shift", "rescale_betas_zero_snr")}


def _scheduled(schedule: TrainingSchedule, chosen: OwnSampler, spacing: str | None) -> TrainingSchedule:
    """Return the training schedule as a sampler sees it."""
    if chosen.rescale_betas_zero_snr is not None:
        schedule = msgspec.structs.replace(schedule, rescale_betas_zero_snr=chosen.rescale_betas_zero_snr)
    if spacing not in TIMESTEP_SPACINGS:
        return schedule
    if schedule.edm is not None or is_flow(schedule):
        raise RequestError(
            f"spacing: '{spacing}' spaces training timesteps, which this checkpoint's noise has not; use karras"
        )
    return msgspec.structs.replace(schedule, timestep_spacing=spacing)


def _name(chosen: OwnSampler, spacing: str | None) -> Name:
    """Return the name of the plan, with the spacing of sigmas that was asked for."""
    name = Name(chosen.name, chosen.spacing, own=bool(chosen.options))
    if spacing is None or spacing in TIMESTEP_SPACINGS:
        return name
    if spacing not in SPACINGS:
        raise RequestError(f"spacing: found '{spacing}', expected one of {', '.join((*TIMESTEP_SPACINGS, *SPACINGS))}")
    if name.spacing not in (None, spacing):
        raise RequestError(f"spacing: found '{spacing}', but '{name}' names another")
    if not SAMPLERS[name.sampler].spaced:
        raise RequestError(f"spacing: {name.sampler} has its own timesteps and cannot follow '{spacing}'")
    return name._replace(spacing=spacing)


def _check_shares(
    name: Name, line: Sampler, schedule: TrainingSchedule, *, strength: float, stop: float, eta: float | None
) -> None:
    for option, value in (("strength", strength), ("stop", stop), ("eta", 0.0 if eta is None else eta)):
        if not 0 <= value <= 1:
            raise RequestError(f"{option}: found {value}, expected 0 to 1")
    if eta is not None and line.eta is None:
        raise RequestError(f"eta: {name} takes none; ddim and tcd do")
    if schedule.edm is not None and not line.measured:
        raise RequestError(
            f"sampler: {name} counts training timesteps, and this checkpoint has none; use euler or dpmpp_2m"
        )
    if name.spacing in NOT_OF_FLOWS and is_flow(schedule):
        raise RequestError(f"spacing: '{name.spacing}' spaces the noise of a diffusion, not of a flow; use karras")
    if schedule.prediction_type not in line.predictions:
        raise RequestError(
            f"sampler: {name} does not follow a model that predicts {schedule.prediction_type}; expected one of "
            + ", ".join(other for other, row in SAMPLERS.items() if schedule.prediction_type in row.predictions)
        )


def _requested_steps(
    name: Name,
    line: Sampler,
    schedule: TrainingSchedule,
    *,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> RequestedSteps:
    _check_given(name, line, schedule, timesteps=timesteps, sigmas=sigmas)
    given = len(timesteps) if timesteps is not None else len(sigmas) - 1 if sigmas is not None else steps
    if given is None:
        raise RequestError("steps: missing, expected a number of steps (or timesteps, or sigmas)")
    if steps is not None and steps != given:
        raise RequestError(f"steps: found {steps}, expected {given} as timesteps or sigmas have")
    if type(given) is not int or not 1 <= given <= schedule.num_train_timesteps:
        raise RequestError(f"steps: found {given}, expected 1 to {schedule.num_train_timesteps}")
    return RequestedSteps(
        steps=given,
        spacing=name.spacing,
        timesteps=None if timesteps is None else tuple(timesteps),
        sigmas=None if sigmas is None else tuple(sigmas),
    )


def _shift(
    schedule: TrainingSchedule, requested: RequestedSteps, shift: float | None, tokens: int | None
) -> float | None:
    """Return how far steps move towards the noise: as asked for, else as the checkpoint's own; given ones stay."""
    if shift is None:
        given = requested.sigmas is not None or requested.timesteps is not None
        return None if given or not is_flow(schedule) else shift_for(schedule, tokens)
    if not 0 < shift < np.inf or (shift != 1 and not is_flow(schedule)):
        raise RequestError(f"shift: found {shift}, expected a positive number, and 1 where the model is not of a flow")
    return shift


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
        raise RequestError(f"{asked[0]}: it and `{asked[1]}` each say where to step; give only one")
    if timesteps is not None:
        if not line.timed or schedule.edm is not None:
            raise RequestError(f"timesteps: {name} has its own here")
        most = schedule.num_train_timesteps - (not is_flow(schedule))  # a flow counts from 1, and from noise alone
        _check_falling("timesteps", timesteps, low=0, high=most)
    if sigmas is not None:
        if not line.measured:
            raise RequestError(f"sigmas: {name} takes whole timesteps; give `timesteps`")
        _check_falling("sigmas", sigmas, low=0, high=np.inf)


def _check_falling(name: str, values: Sequence[float], *, low: float, high: float) -> None:
    array = np.array(values, dtype=np.float64)
    inside = bool(np.all((array >= low) & (array <= high) & np.isfinite(array)))
    if array.ndim != 1 or not inside or not bool(np.all(np.diff(array) < 0)):
        raise RequestError(f"{name}: expected finite numbers that decrease, from {high:g} at most to {low:g} at least")


def _first(schedule: TrainingSchedule, steps: int, strength: float) -> int:
    """Return the first step to take of an image of which a share is to change."""
    share = min(steps * strength, steps)
    return int(steps - share) if schedule.partial_step == "taken" else steps - int(share)


def _part(grid: Discretization, begin: int, *, stop: float) -> Discretization:
    end = round(stop * len(grid.intervals))
    if begin >= end:
        raise RequestError(
            f"strength: together with a `stop` of {stop:g} it leaves none of {len(grid.intervals)} steps to take; "
            "raise one of the three"
        )
    return grid.part(begin, end)
