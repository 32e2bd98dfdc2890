"""DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095: multistep and single-step, with and without noise.

The four kinds differ in what is extrapolated, the noise or the picture, and in whether noise is added. Each is
given by its weights of [latents, D0, D1 (second order), D1, D2 (third order), fresh noise] for a step in lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised, noise
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import Level

FEW = 15  # on ways with fewer legs the last ones are of lower order, as the authors advise for stability

Kind = Literal["dpm", "dpmpp", "sde-dpm", "sde-dpmpp"]


class Weights(NamedTuple):
    """What each term of a step weighs."""

    latents: float
    value: float  # D0
    slope: float  # D1 of a second-order step
    slope3: float = 0.0  # D1 of a third-order step
    curve3: float = 0.0  # D2 of a third-order step
    fresh: float = 0.0


def _dpmpp(here: Level, there: Level, h: float) -> Weights:
    # Algorithm 2 (2M); third order from the appendix's expansion
    e, a = math.expm1(-h), there.alpha
    return Weights(there.sigma / here.sigma, -a * e, -a * e / 2, *_third(a, e, h))


def _third(a: float, e: float, h: float) -> tuple[float, float]:
    if h == 0 or math.isinf(h):  # no step at all, or the last one: never of third order
        return 0.0, 0.0
    return a * (e / h + 1), -a * ((e + h) / h**2 - 0.5)


def _dpm(here: Level, there: Level, h: float) -> Weights:
    # arXiv:2206.00927, eq. 3.7 and Algorithm 1
    e, s = math.expm1(h), there.sigma
    third = (0.0, 0.0) if h == 0 else (-s * (e / h - 1), -s * ((e - h) / h**2 - 0.5))
    return Weights(there.alpha / here.alpha, -s * e, -s * e / 2, *third)


def _sde_dpmpp(here: Level, there: Level, h: float) -> Weights:
    # SDE-DPM-Solver++, appendix A of arXiv:2211.01095: the step doubles and noise fills the variance
    e, a = -math.expm1(-2 * h), there.alpha
    third = (0.0, 0.0) if h == 0 or math.isinf(h) else (a * (1 - e / (2 * h)), a * ((e - 2 * h) / (2 * h) ** 2 - 0.5))
    return Weights(there.sigma / here.sigma * math.exp(-h), a * e, a * e / 2, *third, fresh=there.sigma * math.sqrt(e))


def _sde_dpm(here: Level, there: Level, h: float) -> Weights:
    e, s = math.expm1(h), there.sigma
    return Weights(there.alpha / here.alpha, -2 * s * e, -s * e, fresh=s * math.sqrt(math.expm1(2 * h)))


WEIGHTS: Mapping[Kind, Callable[[Level, Level, float], Weights]] = {
    "dpm": _dpm,
    "dpmpp": _dpmpp,
    "sde-dpm": _sde_dpm,
    "sde-dpmpp": _sde_dpmpp,
}


def _weights(kind: Kind, here: Level, there: Level) -> Weights:
    return WEIGHTS[kind](here, there, there.half_log_snr - here.half_log_snr)


def multistep(walk: Walk, prediction: str, *, kind: Kind, order: int) -> Iterator[Stage]:
    """Yield the stages of the multistep solvers: state is the latents and order - 1 past values."""
    convert = denoised if kind.endswith("dpmpp") else noise
    for k, (timestep, here, there) in walk:
        x, *past, m, z = basis(order)
        values = [convert(x, m, here, prediction), *past]
        degree = 1 if there.sigma == 0 else walk.order(k, order, few=FEW)
        lambdas = [there.half_log_snr, *(walk.legs[k - i].here.half_log_snr for i in range(degree))]
        step = _step(_weights(kind, here, there), x, values[:degree], lambdas, z)
        yield Stage(timestep, here, x, (step, *values[: order - 1]), draws=kind.startswith("sde"))


def _step(w: Weights, x: Array, values: Sequence[Array], lambdas: Sequence[float], z: Array) -> Array:
    """Return the next latents. lambdas: where the step ends, then where the values were taken, newest first."""
    step = w.latents * x + w.value * values[0] + w.fresh * z
    if len(values) == 1:
        return step
    h, h0 = lambdas[0] - lambdas[1], lambdas[1] - lambdas[2]
    near = h / h0 * (values[0] - values[1])
    if len(values) == 2:
        return step + w.slope * near
    h1 = lambdas[2] - lambdas[3]
    far = h / h1 * (values[1] - values[2])
    slope = near + h0 / (h0 + h1) * (near - far)
    curve = h / (h0 + h1) * (near - far)
    return step + w.slope3 * slope + w.curve3 * curve


def singlestep(walk: Walk, prediction: str, *, kind: Kind, order: int) -> Iterator[Stage]:
    """Yield the stages of the single-step solvers: groups of legs of order 1, 2, .. that all start where the first did.

    State is the latents, those at the group's start, and order - 1 past values.
    """
    convert = denoised if kind.endswith("dpmpp") else noise
    for k, (timestep, here, there) in walk:
        x, saved, *past, m, z = basis(order + 1)
        values = [convert(x, m, here, prediction), *past]
        degree = min(_group_orders(len(walk.legs), order)[k], k - walk.begin + 1)
        saved = x if degree == 1 else saved
        levels = [walk.legs[k - i].here for i in range(degree)]
        w = _weights(kind, levels[-1], there)
        lambdas = [level.half_log_snr - levels[-1].half_log_snr for level in (there, *levels)]
        step = w.latents * saved + w.value * values[degree - 1] + w.fresh * z
        if degree > 1:
            rise = lambdas[0] / lambdas[1] * (values[0] - values[degree - 1])
            step = step + (w.slope if degree == 2 else w.slope3) * rise
        yield Stage(timestep, here, x, (step, saved, *values[: order - 1]), draws=kind.startswith("sde"))


def _group_orders(legs: int, order: int) -> list[int]:
    """Return the order of each leg: whole groups, and towards the clean picture an incomplete one."""
    group = list(range(1, order + 1))
    whole, rest = divmod(legs, order)
    if rest == 0:
        whole, rest = whole - 1, order
    orders = group * whole + (group[:rest] if rest < order else [*group[: order - 1], 1])
    return [*orders[:-1], 1]
