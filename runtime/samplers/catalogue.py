"""Which samplers there are: for each its equations and the walk it takes through the noise levels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import Prediction, TrainingSchedule
from latentrt.runtime.plan import SamplingPlan, Stage, compile_plan
from latentrt.runtime.samplers.ddim import ddim
from latentrt.runtime.samplers.dpm import dpmpp_2m
from latentrt.runtime.samplers.euler import euler, euler_ancestral
from latentrt.runtime.samplers.walks import Walk, alpha_bar_walk, dpm_walk, sigma_walk
from latentrt.runtime.schedules import Leg

Equations = Callable[[Sequence[Leg], Prediction], Iterator[Stage]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """One name of the table below."""

    walk: Callable[..., Walk]
    equations: Callable[..., Iterator[Stage]]
    spacing: str | None = None  # of the sigmas; None keeps the checkpoint's timesteps
    takes_eta: bool = False


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(alpha_bar_walk, ddim, takes_eta=True),
    "euler": Sampler(sigma_walk, euler),
    "euler_karras": Sampler(sigma_walk, euler, "karras"),
    "euler_ancestral": Sampler(sigma_walk, euler_ancestral),
    "euler_ancestral_karras": Sampler(sigma_walk, euler_ancestral, "karras"),
    "dpmpp_2m": Sampler(dpm_walk, dpmpp_2m),
    "dpmpp_2m_karras": Sampler(dpm_walk, dpmpp_2m, "karras"),
}


def sampler_names() -> tuple[str, ...]:
    """Return the canonical names, sorted."""
    return tuple(sorted(SAMPLERS))


def make_plan(sampler: str, schedule: TrainingSchedule, *, steps: int, eta: float = 0.0) -> SamplingPlan:
    """Compile a sampler to a plan for a checkpoint's training schedule.

    eta: the share of DDPM's noise in DDIM, 0 to 1
    Raises RequestError when the name is unknown or the number of steps or eta is impossible.
    """
    chosen = _find(sampler)
    _check(sampler, chosen, schedule, steps=steps, eta=eta)
    walk = chosen.walk(schedule, steps, chosen.spacing)
    options = {"eta": eta} if chosen.takes_eta else {}
    with np.errstate(divide="ignore", invalid="ignore"):  # compile_plan refuses what is not finite
        stages = list(chosen.equations(walk.legs, schedule.prediction_type, **options))
    return compile_plan(sampler, stages, steps=steps, initial_scale=walk.initial_scale)


def _find(sampler: str) -> Sampler:
    if sampler in SAMPLERS:
        return SAMPLERS[sampler]
    near = difflib.get_close_matches(sampler, SAMPLERS, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else "expected one of " + ", ".join(sampler_names())
    raise RequestError(f"unknown sampler '{sampler}'; {hint}")


def _check(name: str, sampler: Sampler, schedule: TrainingSchedule, *, steps: int, eta: float) -> None:
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise RequestError(f"steps: found {steps}, expected 1 to {schedule.num_train_timesteps}")
    if not 0 <= eta <= 1:
        raise RequestError(f"eta: found {eta}, expected 0 to 1")
    if eta and not sampler.takes_eta:
        raise RequestError(f"eta: {name} takes none; it is an option of ddim")
