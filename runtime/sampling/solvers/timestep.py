"""DDIM, arXiv:2010.02502, and DDPM, arXiv:2006.11239.

The predicted picture is not clipped: that is not linear, and latents of Stable Diffusion reach far beyond -1..1.
diffusers' classes clip unless the scheduler's config says `clip_sample: false`. The configs that Stable Diffusion was
published with say so, and its pipelines correct one that they are opened with; but a DDIMScheduler or DDPMScheduler
that is made of a PNDM config without the key clips, and then draws another picture (6 to 17 dB from ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import Stage, basis
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised, noise
from latentrt.runtime.sampling.timesteps import Discretization

Variance = Literal["fixed_small", "fixed_large"]
LEAST_VARIANCE = 1e-20  # the reference keeps DDPM's variance above this


def ddim(grid: Discretization, prediction: str, *, eta: float) -> Iterator[Stage]:
    """Yield the stages of DDIM's eqs. 12 and 16: eta 0 is deterministic, eta 1 has the noise of DDPM."""
    for _, (timestep, here, there) in grid:
        x, m, z = basis(1)
        ratio = (here.alpha / there.alpha) ** 2
        std = eta * there.sigma / here.sigma * math.sqrt(max(1 - ratio, 0.0))
        towards = math.sqrt(max(there.sigma**2 - std**2, 0.0))
        picture, direction = denoised(x, m, here, prediction), noise(x, m, here, prediction)
        step = there.alpha * picture + towards * direction + std * z
        yield Stage(timestep, here, x, (step,), draws=eta > 0)


def ddpm(grid: Discretization, prediction: str, *, variance: Variance = "fixed_small") -> Iterator[Stage]:
    """Yield the posterior means of DDPM's eq. 7, and deviations by one of its two variances."""
    for _, (timestep, here, there) in grid:
        x, m, z = basis(1)
        kept = (here.alpha / there.alpha) ** 2
        picture_weight = there.alpha * (1 - kept) / here.sigma**2
        latent_weight = math.sqrt(kept) * there.sigma**2 / here.sigma**2
        small = max((1 - kept) * there.sigma**2 / here.sigma**2, LEAST_VARIANCE)
        std = math.sqrt(small if variance == "fixed_small" else 1 - kept) if timestep > 0 else 0.0
        step = picture_weight * denoised(x, m, here, prediction) + latent_weight * x + std * z
        yield Stage(timestep, here, x, (step,), draws=timestep > 0)


SIGMA_DATA = 0.5


def lcm(grid: Discretization, prediction: str, *, timestep_scaling: float = 10.0) -> Iterator[Stage]:
    """Yield jumps to the picture and back to the next level with fresh noise; the last stays at the picture."""
    for k, (timestep, here, there) in grid:
        x, m, z = basis(1)
        scaled = timestep * timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        picture = scaled / math.hypot(scaled, SIGMA_DATA) * denoised(x, m, here, prediction) + skip * x
        last = k == len(grid.intervals) - 1
        step = picture if last else there.alpha * picture + there.sigma * z
        yield Stage(timestep, here, x, (step,), draws=not last)


def tcd(grid: Discretization, prediction: str, *, eta: float) -> Iterator[Stage]:
    """Yield jumps along the trajectory to s = (1 - eta) * next timestep, and back up to it with fresh noise."""
    for k, (timestep, here, there) in grid:
        x, m, z = basis(1)
        last = k == len(grid.intervals) - 1
        target = grid.at(math.floor((1 - eta) * (0 if last else grid.intervals[k + 1].timestep)))
        picture, direction = denoised(x, m, here, prediction), noise(x, m, here, prediction)
        step = target.alpha * picture + target.sigma * direction
        draws = eta > 0 and not last
        if draws:
            kept = (there.alpha / target.alpha) ** 2
            step = math.sqrt(kept) * step + math.sqrt(max(1 - kept, 0.0)) * z
        yield Stage(timestep, here, x, (step,), draws=draws)


# weights of the outputs, newest first: the Adams-Bashforth formulas, up to eq. 12
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
WARM_UP = 3  # Runge-Kutta steps, for the history that the fourth order needs


def plms(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield PNDM's stages without Runge-Kutta: the first step is done twice, the second time to second order."""
    for k, (timestep, here, there) in grid:
        x, saved, *past, m, _ = basis(5)
        since = k - grid.begin
        if since == 1:
            above = grid.at(int(timestep) + grid.stride)
            step = transfer(saved, (m + past[0]) / 2, above, here, prediction)
            yield Stage(timestep, here, x, (step, saved, *past))
        step = transfer(x, adams([m, *past[: min(since, 3)]]), here, there, prediction)
        yield Stage(timestep, here, x, (step, x, m, *past[:2]))


def pndm(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield F-PNDM: three Runge-Kutta steps of four evaluations, then Adams-Bashforth of fourth order.

    Raises RequestError on fewer than four steps.
    """
    if grid.end - grid.begin <= WARM_UP:
        raise RequestError(f"steps: found {grid.end - grid.begin}, expected {WARM_UP + 1} or more for pndm; use plms")
    for k, (timestep, here, there) in grid:
        if k - grid.begin < WARM_UP:
            yield from _runge_kutta(grid, k, prediction)
            continue
        x, saved, mean, *past, m, _ = basis(6)
        step = transfer(x, adams([m, *past]), here, there, prediction)
        yield Stage(timestep, here, x, (step, saved, mean, m, *past[:2]))


def _runge_kutta(grid: Discretization, k: int, prediction: str) -> Iterator[Stage]:
    """Yield eq. 13's four evaluations; the first of them is an output for the history."""
    start, goal, half = (
        int(grid.intervals[k].timestep),
        int(grid.intervals[k + 1].timestep),
        grid.stride // 2,
    )
    evaluated = (start, goal + half, goal + half, goal)
    ends = (start - half, goal + half, goal, goal)
    for i, (timestep, end, weight) in enumerate(zip(evaluated, ends, RUNGE_KUTTA, strict=True)):
        x, saved, mean, *past, m, _ = basis(6)
        if i == 0:
            saved, mean, past = x, np.zeros_like(m), [m, *past[:2]]
        mean = mean + weight * m
        step = transfer(saved, mean if i == 3 else m, grid.at(start), grid.at(end), prediction)
        yield Stage(float(timestep), grid.at(timestep), x, (step, saved, mean, *past))


def transfer(x: Array, m: Array, here: Level, there: Level, prediction: str) -> Array:
    """Return the latents at another level along the noise that the output m implies: eq. 11, which is DDIM's."""
    a, b = here.alpha**2, there.alpha**2
    slope = a * there.sigma + math.sqrt(a * b) * here.sigma
    return there.alpha / here.alpha * x - (b - a) / slope * noise(x, m, here, prediction)


def adams(outputs: Sequence[Array]) -> Array:
    """Return the Adams-Bashforth combination of one to four outputs, newest first."""
    return np.tensordot(ADAMS[len(outputs) - 1], np.stack(outputs), axes=1)
