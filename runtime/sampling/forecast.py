"""Forecasts: a long plan with fewer calls of the model, the other outputs being extrapolated from those before them.

A stage is linear in the model's output. Where that output is a weighted sum of earlier ones, which the state keeps, the
stage is a matrix alone, and multiplies into the one before it: what is left is a shorter plan, that runs as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS
from latentrt.runtime.sampling.plan import SamplingPlan

LEAST = 7  # with fewer, trials on the demo came no nearer to the long run than as many steps of the sampler
KEPT = 2  # outputs, which a line goes through
FIRST = 3  # stages that call the model in any case: the line goes through two, and the very first may be noise alone


def forecast(plan: SamplingPlan, calls: int) -> SamplingPlan:
    """Return a plan of so many model calls that ends near where the long one does.

    calls: 7 to K - 1, of a plan of K stages; `called_stages` says which of these make them
    The outputs of the others lie on the line through the last two in the logarithm of sigma, noise over picture. The
    state has two rows more. Raises RequestError on plans that cannot be followed so: those that draw fresh noise, or
    call the model twice at one noise level.
    """
    _check(plan, calls)
    called = called_stages(plan.stages, calls)
    steps = np.split(np.arange(plan.stages), called[1:])
    return msgspec.structs.replace(
        plan,
        timesteps=plan.timesteps[called],
        input_rows=np.pad(plan.input_rows[called], ((0, 0), (0, KEPT))),
        transitions=np.stack([_merged(plan, called, step) for step in steps]).astype(np.float32),
        draws_noise=plan.draws_noise[called],
        levels=plan.levels[[*called, plan.stages]],
    )


def called_stages(stages: int, calls: int) -> list[int]:
    """Return which stages of a long plan call the model: the first three, and evenly from the third to the last."""
    return [*range(FIRST - 1), *np.linspace(FIRST - 1, stages - 1, calls - FIRST + 1).round().astype(int).tolist()]


def _log_sigmas(plan: SamplingPlan) -> Array:
    """Return the logarithm of noise over picture at each stage: (K,), float64; infinite where there is no picture."""
    return np.asarray(np.log(plan.sigmas[:-1].astype(np.float64)))


def _merged(plan: SamplingPlan, called: Sequence[int], stages: Array) -> Array:
    """Return the transition of a called stage and of those after it that are not, (R + 2, R + 4), float64.

    The state is the plan's R rows, the newest output and the one before it.
    """
    rows, base = plan.rows, plan.transitions.astype(np.float64)
    first, *skipped = (int(stage) for stage in stages)
    found = np.zeros((rows + KEPT, rows + KEPT + 2))
    found[:rows, :rows], found[:rows, -2:] = base[first, :, :rows], base[first, :, rows:]
    found[rows, -2] = found[rows + 1, rows] = 1
    at, before = _log_sigmas(plan), called[called.index(first) - 1]
    for stage in skipped:
        share = (at[stage] - at[first]) / (at[before] - at[first])
        step = np.eye(rows + KEPT)
        step[:rows] = np.hstack([base[stage, :, :rows], np.outer(base[stage, :, rows], [1 - share, share])])
        found = step @ found
    return found


def _check(plan: SamplingPlan, calls: int) -> None:
    """Raise RequestError on what cannot be forecast."""
    if plan.draws_noise.any():
        raise RequestError(
            f"forecast: {plan.sampler} draws fresh noise as it goes, and fewer draws give another picture; use euler, "
            "ddim or dpmpp_2m, or omit it"
        )
    if (np.diff(_log_sigmas(plan)) >= 0).any():
        raise RequestError(
            f"forecast: {plan.sampler} calls the model several times for a step, and no call of them can be omitted; "
            "use euler, ddim or dpmpp_2m, or omit it"
        )
    if plan.rows + KEPT > STATE_ROWS:
        raise RequestError(
            f"forecast: {plan.sampler} keeps {plan.rows} rows of state, and {KEPT} more are more than the {STATE_ROWS} "
            "of an engine; use unipc or dpmpp_2m, or omit it"
        )
    if type(calls) is not int or not LEAST <= calls < plan.stages:
        raise RequestError(
            f"forecast: found {calls!r}, expected a number of calls from {LEAST} up and less than the {plan.stages} "
            "of the plan; take more steps, or omit it"
        )
