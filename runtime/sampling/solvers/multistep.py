"""UniPC, arXiv:2302.04867: each evaluation first corrects the step that led to it, then predicts the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import Stage, basis
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised, moment_weights, noise
from latentrt.runtime.sampling.timesteps import FEW, Discretization


def unipc(
    grid: Discretization,
    prediction: str,
    *,
    order: int,
    solver_type: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
    predicts_noise: bool = False,
    disable_corrector: Sequence[int] = (),
) -> Iterator[Stage]:
    """Yield the stages of Algorithms 5 and 6: latents, the last corrected ones, past pictures or noises.

    solver_type: which B(h) of the paper; disable_corrector: the intervals after which the corrector is left out
    """
    convert = noise if predicts_noise else denoised
    few = math.inf if lower_order_final else 0
    update = partial(_update, weights=_of_noise if predicts_noise else _of_picture, linear=solver_type == "bh1")
    for k, (timestep, here, there) in grid:
        x, saved, *past, m, _ = basis(2 + order)
        value = convert(x, m, here, prediction)
        corrected = x
        if k > grid.begin and k - 1 not in disable_corrector:
            degree = grid.order(k - 1, order, few=few)
            levels = [here, *(grid.intervals[k - 1 - i].here for i in range(degree))]
            corrected = update(saved, past[:degree], levels, arrived=value)
        values = [value, *past[: order - 1]]
        degree = grid.order(k, order, few=few)
        levels = [there, *(grid.intervals[k - i].here for i in range(degree))]
        step = update(corrected, values[:degree], levels, arrived=None)
        yield Stage(timestep, here, x, (step, corrected, *values))


class _Weights(NamedTuple):
    """What the latents and the values weigh in a step, and the step in lambda as the order conditions count it."""

    latents: float
    values: float
    h: float


def _of_picture(here: Level, there: Level, h: float) -> _Weights:
    return _Weights(there.sigma / here.sigma, there.alpha, -h)


def _of_noise(here: Level, there: Level, h: float) -> _Weights:
    return _Weights(there.alpha / here.alpha, there.sigma, h)


def _update(
    x: Array,
    values: Sequence[Array],
    levels: Sequence[Level],
    *,
    weights: Callable[[Level, Level, float], _Weights],
    linear: bool,
    arrived: Array | None,
) -> Array:
    """Return the latents at levels[0] from those at levels[1].

    values: newest first, taken at levels[1:]; arrived: the value at levels[0], which makes it the corrector
    linear: B(h) is h, else expm1(h)
    """
    goal, start, *earlier = levels
    h = goal.half_log_snr - start.half_log_snr
    latents, weight, signed = weights(start, goal, h)
    phi = math.expm1(signed)  # h phi_1(h)
    base = signed if linear else phi
    ratios = [(level.half_log_snr - start.half_log_snr) / h for level in earlier]
    changes = [(old - values[0]) / r for old, r in zip(values[1:], ratios, strict=True)]
    step = latents * x - weight * phi * values[0]
    if arrived is not None:
        changes, ratios = [*changes, arrived - values[0]], [*ratios, 1.0]
    if not changes:
        return step
    return step - weight * base * np.tensordot(_rhos(ratios, signed, base), np.stack(changes), axes=1)


def _rhos(ratios: Sequence[float], h: float, base: float) -> Array:
    """Solve the order conditions, eq. 9: (len(ratios),), float64. One ratio has the solution 1/2 by convention."""
    if len(ratios) == 1:
        return np.array([0.5])
    phi, factorial, wanted = math.expm1(h) / h - 1, 1, []
    for n in range(len(ratios)):
        wanted.append(phi * factorial / base)
        factorial *= n + 2
        phi = phi / h - 1 / factorial
    return moment_weights(ratios, wanted)


def deis(grid: Discretization, prediction: str, *, order: int, lower_order_final: bool = True) -> Iterator[Stage]:
    """Yield the stages of log-rho AB-DEIS, Table 1: state is the latents and order - 1 past noises."""
    for k, (timestep, here, there) in grid:
        x, *past, m, _ = basis(order)
        noises = [noise(x, m, here, prediction), *past]
        degree = grid.order(k, order, few=FEW if lower_order_final else 0)
        rhos = [grid.intervals[k - i].here for i in range(degree)]
        weights = log_integrals([r.sigma / r.alpha for r in rhos], there.sigma / there.alpha)
        step = x / here.alpha + np.tensordot(weights, np.stack(noises[:degree]), axes=1)
        yield Stage(timestep, here, x, (there.alpha * step, *noises[: order - 1]))


def log_integrals(nodes: Sequence[float], stop: float) -> Array:
    """Return what each node's value weighs in the integral over rho, from nodes[0] to stop, of their interpolation.

    The interpolation is a polynomial in log rho. returns: (len(nodes),), float64
    """
    start, end = nodes[0], math.log(stop / nodes[0])
    moments = [stop - start]  # of u = log(rho / start), each by parts from the one before
    for n in range(1, len(nodes)):
        moments.append(stop * end**n - n * moments[-1])
    return moment_weights([math.log(node / start) for node in nodes], moments)


NOISY = (200, 800)  # timesteps between which tau is 1, the noise of the reverse SDE; elsewhere it is 0


def sa_solver(grid: Discretization, prediction: str, *, lower_order_final: bool = True) -> Iterator[Stage]:
    """Yield Algorithm 1's stages: latents, the last corrected ones, the noise added to them, the last picture."""
    for k, (timestep, here, there) in grid:
        x, saved, added, past, m, z = basis(4)
        picture = denoised(x, m, here, prediction)
        corrected = x
        if k > grid.begin:
            before = grid.intervals[k - 1]
            slope = (picture - past) / (here.half_log_snr - before.here.half_log_snr)
            corrected = _stochastic_update(saved, past, slope, before.here, here, _tau(before.timestep), added)
        slope = 0 * picture
        if grid.order(k, 2, few=math.inf if lower_order_final else 0) == 2:
            slope = (picture - past) / (here.half_log_snr - grid.intervals[k - 1].here.half_log_snr)
        step = _stochastic_update(corrected, picture, slope, here, there, _tau(timestep), z)
        yield Stage(timestep, here, x, (step, corrected, z, picture), draws=True)


def _tau(timestep: float) -> float:
    return 1.0 if NOISY[0] <= timestep <= NOISY[1] else 0.0


def _stochastic_update(
    x: Array, picture: Array, slope: Array, here: Level, there: Level, tau: float, z: Array
) -> Array:
    """Return the latents at `there` by eq. 14, the picture changing by `slope` for each unit of lambda.

    The slope's integral is kept to second order in the step, as the authors' code has it.
    """
    h, rate = there.half_log_snr - here.half_log_snr, 1 + tau**2
    travelled = -math.expm1(-rate * h) * picture + rate * h**2 / 2 * slope
    fresh = there.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return math.exp(-(tau**2) * h) * there.sigma / here.sigma * x + there.alpha * travelled + fresh * z
