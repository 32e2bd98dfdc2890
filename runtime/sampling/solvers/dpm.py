"""DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095: multistep and single-step, with and without noise.

The four kinds differ in what is extrapolated, the noise or the picture, and in whether noise is added. Each is
given by what the terms of its steps weigh: D0 is the value at the start, D1 and D2 its differences in lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import Stage, basis
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised, noise
from latentrt.runtime.sampling.timesteps import FEW, Discretization

Kind = Literal["dpm", "dpmpp", "sde-dpm", "sde-dpmpp"]
Solver = Literal["midpoint", "heun"]


class Weights(NamedTuple):
    """What each term of a step weighs: the latents, D0, the D1 of a second-order step, and fresh noise."""

    latents: float
    value: float
    slope: float
    fresh: float = 0.0


def _dpmpp(here: Level, there: Level, h: float) -> Weights:
    # arXiv:2211.01095, Algorithm 2
    e, a = math.expm1(-h), there.alpha
    return Weights(there.sigma / here.sigma, -a * e, -a * e / 2)


def _dpm(here: Level, there: Level, h: float) -> Weights:
    # arXiv:2206.00927, eq. 3.7 and Algorithm 1
    e, s = math.expm1(h), there.sigma
    return Weights(there.alpha / here.alpha, -s * e, -s * e / 2)


def _sde_dpmpp(here: Level, there: Level, h: float) -> Weights:
    # arXiv:2211.01095, appendix A: the step in lambda doubles, and noise fills the variance
    e, a = -math.expm1(-2 * h), there.alpha
    return Weights(there.sigma / here.sigma * math.exp(-h), a * e, a * e / 2, there.sigma * math.sqrt(e))


def _sde_dpm(here: Level, there: Level, h: float) -> Weights:
    e, s = math.expm1(h), there.sigma
    return Weights(there.alpha / here.alpha, -2 * s * e, -s * e, s * math.sqrt(math.expm1(2 * h)))


WEIGHTS: Mapping[Kind, Callable[[Level, Level, float], Weights]] = {
    "dpm": _dpm,
    "dpmpp": _dpmpp,
    "sde-dpm": _sde_dpm,
    "sde-dpmpp": _sde_dpmpp,
}

# what D1 weighs in a second-order step after Heun and in a third-order one, of (level at the end, h)
HEUN: Mapping[Kind, Callable[[Level, float], float]] = {
    "dpm": lambda there, h: -there.sigma * (math.expm1(h) / h - 1),
    "dpmpp": lambda there, h: there.alpha * (math.expm1(-h) / h + 1),
    "sde-dpm": lambda there, h: -2 * there.sigma * (math.expm1(h) / h - 1),
    "sde-dpmpp": lambda there, h: there.alpha * (1 + math.expm1(-2 * h) / (2 * h)),
}
# what D2 weighs in a third-order step: the next terms of the same expansions
CURVE: Mapping[Kind, Callable[[Level, float], float]] = {
    "dpm": lambda there, h: -there.sigma * ((math.expm1(h) - h) / h**2 - 0.5),
    "dpmpp": lambda there, h: -there.alpha * ((math.expm1(-h) + h) / h**2 - 0.5),
    "sde-dpmpp": lambda there, h: -there.alpha * ((math.expm1(-2 * h) + 2 * h) / (2 * h) ** 2 + 0.5),
}


def multistep(
    grid: Discretization,
    prediction: str,
    *,
    kind: Kind,
    order: int,
    solver_type: Solver = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Stage]:
    """Yield the stages of the multistep solvers: state is the latents and order - 1 past values."""
    convert = denoised if kind.endswith("dpmpp") else noise
    for k, (timestep, here, there) in grid:
        x, *past, m, z = basis(order)
        values = [convert(x, m, here, prediction), *past]
        degree = grid.order(k, order, few=FEW if lower_order_final else 0)
        # to the clean picture, or nowhere (some spacings repeat the least noise): neither has a higher order
        if there.sigma == 0 or there == here or (euler_at_final and k == len(grid.intervals) - 1):
            degree = 1
        lambdas = [there.half_log_snr, *(grid.intervals[k - i].here.half_log_snr for i in range(degree))]
        h = lambdas[0] - lambdas[1]
        weights = WEIGHTS[kind](here, there, h)
        step = weights.latents * x + weights.value * values[0] + weights.fresh * z
        if degree == 2:
            slope = HEUN[kind](there, h) if solver_type == "heun" else weights.slope
            step = step + slope * _differences(values, lambdas)[0]
        if degree == 3:
            step = step + _third(kind, there, values, lambdas)
        yield Stage(timestep, here, x, (step, *values[: order - 1]), draws=kind.startswith("sde"))


def _differences(values: Sequence[Array], lambdas: Sequence[float]) -> list[Array]:
    """Return the divided differences of neighbouring values, for a step from lambdas[1] to lambdas[0]."""
    h = lambdas[0] - lambdas[1]
    return [
        h / (later - earlier) * (new - old)
        for new, old, later, earlier in zip(values, values[1:], lambdas[1:], lambdas[2:], strict=False)
    ]


def _third(kind: Kind, there: Level, values: Sequence[Array], lambdas: Sequence[float]) -> Array:
    """Return the part of a third-order step that comes from three values. lambdas: the step's end before theirs."""
    h, h0, h1 = (lambdas[i] - lambdas[i + 1] for i in range(3))
    near, far = _differences(values, lambdas)
    change = (near - far) / (h0 + h1)
    return HEUN[kind](there, h) * (near + h0 * change) + CURVE[kind](there, h) * h * change


def singlestep(
    grid: Discretization,
    prediction: str,
    *,
    kind: Kind,
    order: int,
    solver_type: Solver = "midpoint",
    lower_order_final: bool = False,
) -> Iterator[Stage]:
    """Yield the stages of the single-step solvers: groups of intervals of order 1, 2, .. with one start.

    State is the latents, those at the group's start, and order - 1 past values.
    """
    convert = denoised if kind.endswith("dpmpp") else noise
    clean = grid.intervals[-1].there.sigma == 0
    orders = _group_orders(len(grid.intervals), order, clean=clean, lower=clean or lower_order_final)
    for k, (timestep, here, there) in grid:
        x, saved, *past, m, z = basis(order + 1)
        values = [convert(x, m, here, prediction), *past]
        degree = min(orders[k], k - grid.begin + 1)
        saved = x if degree == 1 else saved
        levels = [grid.intervals[k - i].here for i in range(degree)]
        h, *since = (level.half_log_snr - levels[-1].half_log_snr for level in (there, *levels[:-1]))
        weights = WEIGHTS[kind](levels[-1], there, h)
        step = weights.latents * saved + weights.value * values[degree - 1] + weights.fresh * z
        slopes = [h / s * (value - values[degree - 1]) for s, value in zip(since, values, strict=False)]
        if degree == 2:
            step = step + (HEUN[kind](there, h) if solver_type == "heun" else weights.slope) * slopes[0]
        elif degree == 3 and solver_type == "midpoint":
            step = step + HEUN[kind](there, h) * slopes[0]
        elif degree == 3:
            step = step + _third_of_group(kind, there, slopes, (h, *since))
        yield Stage(timestep, here, x, (step, saved, *values[: order - 1]), draws=kind.startswith("sde"))


def _third_of_group(kind: Kind, there: Level, slopes: Sequence[Array], since: Sequence[float]) -> Array:
    """Return the part of a third-order step of a group that comes from both slopes. since: from the group's start."""
    h, near, far = since
    bend = (slopes[0] - slopes[1]) * h / (near - far)
    slope = slopes[1] - far / h * bend
    return HEUN[kind](there, h) * slope + 2 * CURVE[kind](there, h) * bend


def _group_orders(intervals: int, order: int, *, clean: bool, lower: bool) -> list[int]:
    """Return the order of each interval: whole groups, and a smaller one where the last is to be lower or does not fit.

    clean: the last interval ends at the clean picture, which only the first order reaches
    """
    group = list(range(1, order + 1))
    whole, rest = divmod(intervals, order)
    if rest == 0 and lower:
        whole, rest = whole - 1, order
    orders = group * whole + (group[:rest] if rest < order else [*group[: order - 1], 1])
    return [*orders[:-1], 1] if clean else orders
