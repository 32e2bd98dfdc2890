"""UniPC, arXiv:2302.04867: each evaluation first corrects the step that led to it, then predicts the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised, noise
from latentrt.runtime.samplers.quadrature import moment_weights
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import Level


def unipc(
    walk: Walk,
    prediction: str,
    *,
    order: int,
    solver_type: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
    predicts_noise: bool = False,
    disable_corrector: Sequence[int] = (),
) -> Iterator[Stage]:
    """Yield the stages of Algorithms 5 and 6: latents, the last corrected ones, past pictures or noises.

    solver_type: which B(h) of the paper; disable_corrector: the legs after which the corrector is left out
    """
    convert = noise if predicts_noise else denoised
    few = math.inf if lower_order_final else 0
    update = partial(_update, weights=_of_noise if predicts_noise else _of_picture, linear=solver_type == "bh1")
    for k, (timestep, here, there) in walk:
        x, saved, *past, m, _ = basis(2 + order)
        value = convert(x, m, here, prediction)
        corrected = x
        if k > walk.begin and k - 1 not in disable_corrector:
            degree = walk.order(k - 1, order, few=few)
            levels = [here, *(walk.legs[k - 1 - i].here for i in range(degree))]
            corrected = update(saved, past[:degree], levels, arrived=value)
        values = [value, *past[: order - 1]]
        degree = walk.order(k, order, few=few)
        levels = [there, *(walk.legs[k - i].here for i in range(degree))]
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
