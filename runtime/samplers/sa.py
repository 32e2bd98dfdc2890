"""SA-Solver, arXiv:2309.05019: a stochastic Adams predictor and corrector of second order, in data prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import Level

NOISY = (200, 800)  # timesteps between which tau is 1, the noise of the reverse SDE; elsewhere it is 0


def sa_solver(walk: Walk, prediction: str, *, lower_order_final: bool = True) -> Iterator[Stage]:
    """Yield Algorithm 1's stages: latents, the last corrected ones, the noise added to them, the last picture."""
    for k, (timestep, here, there) in walk:
        x, saved, added, past, m, z = basis(4)
        picture = denoised(x, m, here, prediction)
        corrected = x
        if k > walk.begin:
            before = walk.legs[k - 1]
            slope = (picture - past) / (here.half_log_snr - before.here.half_log_snr)
            corrected = _update(saved, past, slope, before.here, here, _tau(before.timestep), added)
        slope = 0 * picture
        if walk.order(k, 2, few=math.inf if lower_order_final else 0) == 2:
            slope = (picture - past) / (here.half_log_snr - walk.legs[k - 1].here.half_log_snr)
        step = _update(corrected, picture, slope, here, there, _tau(timestep), z)
        yield Stage(timestep, here, x, (step, corrected, z, picture), draws=True)


def _tau(timestep: float) -> float:
    return 1.0 if NOISY[0] <= timestep <= NOISY[1] else 0.0


def _update(x: Array, picture: Array, slope: Array, here: Level, there: Level, tau: float, z: Array) -> Array:
    """Return the latents at `there` by eq. 14, the picture changing by `slope` for each unit of lambda.

    The slope's integral is kept to second order in the step, as the authors' code has it.
    """
    h, rate = there.half_log_snr - here.half_log_snr, 1 + tau**2
    travelled = -math.expm1(-rate * h) * picture + rate * h**2 / 2 * slope
    fresh = there.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return math.exp(-(tau**2) * h) * there.sigma / here.sigma * x + there.alpha * travelled + fresh * z
