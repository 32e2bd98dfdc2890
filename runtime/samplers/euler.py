"""Samplers of one evaluation a step that count in sigma, arXiv:2206.00364: latents = picture + sigma * noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised
from latentrt.runtime.samplers.quadrature import moment_weights
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import Level

LMS_ORDER = 4


def slope(x: Array, m: Array, level: Level, prediction: str) -> Array:
    """Return dx / d sigma: the direction of the probability flow, eq. 1."""
    return (x - denoised(x, m, level, prediction)) / level.sigma


def euler(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield the stages of Algorithm 1 without its second-order correction."""
    for _, (timestep, here, there) in walk:
        x, m, _ = basis(1)
        step = x + (there.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, x / here.size, (step,))


def euler_ancestral(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield Euler steps that go below the next level and come back to it with fresh noise."""
    for _, (timestep, here, there) in walk:
        x, m, z = basis(1)
        down, up = ancestral_split(here.sigma, there.sigma)
        step = x + (down - here.sigma) * slope(x, m, here, prediction) + up * z
        yield Stage(timestep, here, x / here.size, (step,), draws=True)


def ancestral_split(here: float, there: float) -> tuple[float, float]:
    """Return (down, up) with down² + up² = there², up the deviation of arXiv:2006.11239, eq. 7."""
    up = there * math.sqrt(max(here**2 - there**2, 0.0)) / here
    return math.sqrt(max(there**2 - up**2, 0.0)), up


def lms(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield linear multistep stages: up to four past slopes, weighted by the integrals of their Lagrange basis."""
    for k, (timestep, here, there) in walk:
        x, *past, m, _ = basis(LMS_ORDER)
        order = min(k - walk.begin + 1, LMS_ORDER)
        slopes = [slope(x, m, here, prediction), *past[: order - 1]]
        nodes = [walk.legs[k - i].here.sigma for i in range(order)]
        weights = lagrange_integrals(nodes, there.sigma)
        step = x + np.tensordot(weights, np.stack(slopes), axes=1)
        yield Stage(timestep, here, x / here.size, (step, slopes[0], *past[: LMS_ORDER - 2]))


def lagrange_integrals(nodes: Sequence[float], stop: float) -> Array:
    """Integrate each Lagrange basis polynomial of the nodes from nodes[0] to stop: (len(nodes),), float64."""
    width = stop - nodes[0]
    moments = [1 / (n + 1) for n in range(len(nodes))]  # over the step, scaled to run from 0 to 1
    return width * moment_weights([(node - nodes[0]) / width for node in nodes], moments)
