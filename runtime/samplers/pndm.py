"""Pseudo numerical methods, arXiv:2202.09778: PLMS and PNDM, which starts with Runge-Kutta steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import noise
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import Level

# weights of the outputs, newest first: the Adams-Bashforth formulas, up to eq. 12
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
WARM_UP = 3  # Runge-Kutta steps, for the history that the fourth order needs


def plms(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield PNDM's stages without Runge-Kutta: the first step is done twice, the second time to second order."""
    for k, (timestep, here, there) in walk:
        x, saved, *past, m, _ = basis(5)
        since = k - walk.begin
        if since == 1:
            above = walk.at(int(timestep) + walk.stride)
            step = transfer(saved, (m + past[0]) / 2, above, here, prediction)
            yield Stage(timestep, here, x, (step, saved, *past))
        step = transfer(x, adams([m, *past[: min(since, 3)]]), here, there, prediction)
        yield Stage(timestep, here, x, (step, x, m, *past[:2]))


def pndm(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield F-PNDM: three Runge-Kutta steps of four evaluations, then Adams-Bashforth of fourth order.

    Raises RequestError on fewer than four steps.
    """
    if walk.end - walk.begin <= WARM_UP:
        raise RequestError(f"steps: found {walk.end - walk.begin}, expected {WARM_UP + 1} or more for pndm; use plms")
    for k, (timestep, here, there) in walk:
        if k - walk.begin < WARM_UP:
            yield from _runge_kutta(walk, k, prediction)
            continue
        x, saved, mean, *past, m, _ = basis(6)
        step = transfer(x, adams([m, *past]), here, there, prediction)
        yield Stage(timestep, here, x, (step, saved, mean, m, *past[:2]))


def _runge_kutta(walk: Walk, k: int, prediction: str) -> Iterator[Stage]:
    """Yield eq. 13's four evaluations; the first of them is an output for the history."""
    start, goal, half = int(walk.legs[k].timestep), int(walk.legs[k + 1].timestep), walk.stride // 2
    told = (start, goal + half, goal + half, goal)
    ends = (start - half, goal + half, goal, goal)
    for i, (timestep, end, weight) in enumerate(zip(told, ends, RUNGE_KUTTA, strict=True)):
        x, saved, mean, *past, m, _ = basis(6)
        if i == 0:
            saved, mean, past = x, np.zeros_like(m), [m, *past[:2]]
        mean = mean + weight * m
        step = transfer(saved, mean if i == 3 else m, walk.at(start), walk.at(end), prediction)
        yield Stage(float(timestep), walk.at(timestep), x, (step, saved, mean, *past))


def transfer(x: Array, m: Array, here: Level, there: Level, prediction: str) -> Array:
    """Return the latents at another level along the noise that the output m implies: eq. 11, which is DDIM's."""
    a, b = here.alpha**2, there.alpha**2
    slope = a * there.sigma + math.sqrt(a * b) * here.sigma
    return there.alpha / here.alpha * x - (b - a) / slope * noise(x, m, here, prediction)


def adams(outputs: Sequence[Array]) -> Array:
    """Return the Adams-Bashforth combination of one to four outputs, newest first."""
    return np.tensordot(ADAMS[len(outputs) - 1], np.stack(outputs), axes=1)
