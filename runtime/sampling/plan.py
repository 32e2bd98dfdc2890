"""A sampler as data: a stack of small matrices that any runtime can execute, and who takes which of its stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array


class SamplingPlan(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What to do at each of K stages, for one picture whose state S is R latent-shaped rows.

    To execute: S[0] = initial_scale * unit noise and the other rows zero (from an image:
    S[0] = levels[0] @ [image; unit noise]). Then for each stage k, with z unit noise where draws_noise[k] and
    zero elsewhere:

        m = model(input_rows[k] @ S, timesteps[k])
        S = transitions[k] @ [S; m; z]

    m is the model's raw output after guidance (epsilon, v or sample). After the last stage S[0] is the clean
    latents.
    """

    sampler: str  # the canonical name, for example dpmpp_2m_karras
    steps: int  # as asked; some samplers evaluate the model more than once a step
    timesteps: Array  # (K,) float32: what the model gets
    input_rows: Array  # (K, R) float32
    transitions: Array  # (K, R, R + 2) float32
    draws_noise: Array  # (K,) bool: where unit noise is taken from the generator, even if its weight is zero
    initial_scale: float
    levels: Array  # (K + 1, 2) float32: before stage k, and at the end, S[0] is levels[k] @ [picture; noise]

    @property
    def stages(self) -> int:
        """Return K, the number of model evaluations."""
        return int(self.transitions.shape[0])

    @property
    def rows(self) -> int:
        """Return R, the number of latent-shaped rows of one picture's state."""
        return int(self.transitions.shape[1])

    @property
    def uses_noise(self) -> Array:
        """Tell at which stages the noise has any weight: (K,), bool."""
        return np.asarray(np.any(self.transitions[:, :, -1] != 0, axis=1))

    @property
    def sigmas(self) -> Array:
        """Return noise over picture in S[0] before each stage and at the end: (K + 1,), float32, inf for no picture."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.levels[:, 1] / self.levels[:, 0])


class Stage(NamedTuple):
    """One stage as a sampler's equations write it: vectors of R + 2 numbers, the weights of [S; m; z]."""

    timestep: float
    level: tuple[float, float]  # weights of picture and noise in S[0] before the stage
    input: Array  # what the model sees
    state: tuple[Array, ...]  # the R rows of the next state
    draws: bool = False


def basis(rows: int) -> Array:
    """Return the state's rows, the model's output and the noise as unknowns: the identity matrix, float64.

    Equations that run on these vectors instead of on latents leave their coefficients.
    """
    return np.eye(rows + 2)


def compile_plan(
    name: str, stages: Iterable[Stage], *, steps: int, initial_scale: float, end: tuple[float, float]
) -> SamplingPlan:
    """Stack stages into a plan. Raises RequestError if a number in it is not finite.

    end: the weights of picture and noise in S[0] after the last stage
    """
    stack = list(stages)
    levels = [*(stage.level for stage in stack), end]
    plan = SamplingPlan(
        sampler=name,
        steps=steps,
        timesteps=np.array([stage.timestep for stage in stack], dtype=np.float32),
        input_rows=np.array([stage.input[:-2] for stage in stack], dtype=np.float32),
        transitions=np.array([stage.state for stage in stack], dtype=np.float32),
        draws_noise=np.array([stage.draws for stage in stack], dtype=bool),
        initial_scale=float(initial_scale),
        levels=np.array(levels, dtype=np.float32),
    )
    _refuse_nonfinite(plan)
    return plan


def _refuse_nonfinite(plan: SamplingPlan) -> None:
    for field in ("timesteps", "input_rows", "transitions", "levels"):
        if not np.isfinite(getattr(plan, field)).all():
            raise RequestError(
                f"sampler: the plan of {plan.sampler} with {plan.steps} steps has a {field} entry that is not finite; "
                "this sampler cannot follow this checkpoint's noise schedule; choose another"
            )


class DenoiserRange(msgspec.Struct, frozen=True, kw_only=True):
    """Stages of a plan that one denoiser takes: from the first to before the end."""

    denoiser: str
    stages: range


def split(
    plan: SamplingPlan, refine_from: float, denoisers: tuple[str, ...], *, train_timesteps: int
) -> tuple[DenoiserRange, ...]:
    """Return who takes which stages of a plan, in order; a denoiser without a stage is omitted.

    refine_from: the share of the training timesteps, from the noisy end, before which the base denoises: diffusers'
        denoising_end and denoising_start. A stage belongs to the refiner where its timestep lies below, and so do
        all stages after the first such one.
    denoisers: the one that draws, and the one that refines
    Raises RequestError if no stage is left for the refiner.
    """
    if not 0 < refine_from < 1:
        raise RequestError(f"refine_from: found {refine_from:g}, expected a share of the noise between 0 and 1")
    cutoff = round(train_timesteps - refine_from * train_timesteps)
    below = plan.timesteps < cutoff
    if not below.any():
        raise RequestError(
            f"refine_from: the last of {plan.stages} stages is at timestep {plan.timesteps[-1]:g}, and {refine_from:g} "
            f"leaves the refiner those below {cutoff}; lower it, or take more steps"
        )
    switch = int(np.argmax(below))
    parts = range(switch), range(switch, plan.stages)
    return tuple(DenoiserRange(denoiser=name, stages=part) for name, part in zip(denoisers, parts, strict=True) if part)
