"""Samplers of one evaluation a step that count in sigma, arXiv:2206.00364: latents = picture + sigma * noise.

The same equations hold for a flow's latents, (1 - sigma) * picture + sigma * noise: along both, the latents change with
sigma by (latents - picture) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import Stage, basis
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised, moment_weights
from latentrt.runtime.sampling.timesteps import Discretization

LMS_ORDER = 4


def slope(x: Array, m: Array, level: Level, prediction: str) -> Array:
    """Return dx / d sigma: the direction of the probability flow, eq. 1."""
    return (x - denoised(x, m, level, prediction)) / level.sigma


def euler(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield the stages of Algorithm 1 without its second-order correction."""
    for _, (timestep, here, there) in grid:
        x, m, _ = basis(1)
        step = x + (there.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, grid.seen(x, here), (step,))


def euler_ancestral(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield Euler steps that go below the next level and come back to it with fresh noise."""
    for _, (timestep, here, there) in grid:
        x, m, z = basis(1)
        down, kept, fresh = ancestral_split(here, there, grid.level)
        step = kept * (x + (down - here.sigma) * slope(x, m, here, prediction)) + fresh * z
        yield Stage(timestep, here, grid.seen(x, here), (step,), draws=True)


class Split(NamedTuple):
    """A step that goes below the next level and comes back to it: the sigma it goes to, and what then weighs what."""

    down: float
    kept: float
    fresh: float


def ancestral_split(here: Level, there: Level, down_level: Callable[[float], Level]) -> Split:
    """Return how to go below a level and back to it by its picture's weight: arXiv:2006.11239, eq. 7, for any level."""
    down = down_level(there.sigma**2 / here.sigma)
    kept = there.alpha / down.alpha
    return Split(down.sigma, kept, math.sqrt(max(there.sigma**2 - (kept * down.sigma) ** 2, 0.0)))


def lms(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield linear multistep stages: up to four past slopes, weighted by the integrals of their Lagrange basis."""
    for k, (timestep, here, there) in grid:
        x, *past, m, _ = basis(LMS_ORDER)
        order = min(k - grid.begin + 1, LMS_ORDER)
        slopes = [slope(x, m, here, prediction), *past[: order - 1]]
        nodes = [grid.intervals[k - i].here.sigma for i in range(order)]
        weights = lagrange_integrals(nodes, there.sigma)
        step = x + np.tensordot(weights, np.stack(slopes), axes=1)
        yield Stage(timestep, here, grid.seen(x, here), (step, slopes[0], *past[: LMS_ORDER - 2]))


def lagrange_integrals(nodes: Sequence[float], stop: float) -> Array:
    """Integrate each Lagrange basis polynomial of the nodes from nodes[0] to stop: (len(nodes),), float64."""
    width = stop - nodes[0]
    moments = [1 / (n + 1) for n in range(len(nodes))]  # over the step, scaled to run from 0 to 1
    return width * moment_weights([(node - nodes[0]) / width for node in nodes], moments)


def heun(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield Algorithm 1 of arXiv:2206.00364: an Euler step, then the mean of the slopes at its two ends."""
    for k, (timestep, here, there) in grid:
        width = there.sigma - here.sigma
        x, _, _, m, _ = basis(3)
        first = slope(x, m, here, prediction)
        yield Stage(timestep, here, grid.seen(x, here), (x + width * first, x, first))
        if there.sigma == 0:
            continue
        x, saved, first, m, _ = basis(3)
        mean = (first + slope(x, m, there, prediction)) / 2
        yield Stage(grid.timestep_after(k), there, grid.seen(x, there), (saved + width * mean, saved, first))


def kdpm2(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver-2, arXiv:2206.00927, in sigma: the slope at the middle, in log sigma, makes the step."""
    for _, (timestep, here, there) in grid:
        middle = grid.level(math.sqrt(here.sigma * there.sigma))
        x, _, m, _ = basis(2)
        half = x + (middle.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, grid.seen(x, here), (half, x))
        if there.sigma == 0:
            continue
        x, saved, m, _ = basis(2)
        step = saved + (there.sigma - here.sigma) * slope(x, m, middle, prediction)
        yield Stage(grid.timestep_at(middle.sigma), middle, grid.seen(x, middle), (step, saved))


def kdpm2_ancestral(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield kdpm2 steps that go below the next level and come back to it with fresh noise."""
    for _, (timestep, here, there) in grid:
        down, kept, fresh = ancestral_split(here, there, grid.level)
        middle = grid.level(math.sqrt(here.sigma * down))
        x, _, m, _ = basis(2)
        half = x + (middle.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, grid.seen(x, here), (half, x))
        if there.sigma == 0:
            continue
        x, saved, m, z = basis(2)
        step = kept * (saved + (down - here.sigma) * slope(x, m, middle, prediction)) + fresh * z
        yield Stage(grid.timestep_at(middle.sigma), middle, grid.seen(x, middle), (step, saved), draws=True)


def dpmpp_2s_ancestral(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver++ (2S), arXiv:2211.01095, to below the next level, and back to it with fresh noise."""
    for _, (timestep, here, there) in grid:
        x, _, m, _ = basis(2)
        picture = denoised(x, m, here, prediction)
        if there.sigma == 0:
            yield Stage(timestep, here, grid.seen(x, here), (picture, x))
            continue
        down, kept, fresh = ancestral_split(here, there, grid.level)
        middle = grid.level(math.sqrt(here.sigma * down))
        ratio = middle.sigma / here.sigma
        yield Stage(timestep, here, grid.seen(x, here), (ratio * x + (1 - ratio) * picture, x))
        x, saved, m, z = basis(2)
        ratio = down / here.sigma
        step = kept * (ratio * saved + (1 - ratio) * denoised(x, m, middle, prediction)) + fresh * z
        yield Stage(grid.timestep_at(middle.sigma), middle, grid.seen(x, middle), (step, saved), draws=True)


def dpmpp_sde(grid: Discretization, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver++ (2S) with noise: to the middle in log sigma, and with its picture from start to end.

    Both moves of a step ride on one Brownian path in sigma, so the second one's noise contains the first one's.
    """
    for _, (timestep, here, there) in grid:
        x, _, unused, m, z = basis(3)
        picture = denoised(x, m, here, prediction)
        if there.sigma == 0:
            yield Stage(timestep, here, grid.seen(x, here), (picture, x, unused))
            continue
        middle = grid.level(math.sqrt(here.sigma * there.sigma))
        down, kept, fresh = ancestral_split(here, middle, grid.level)
        ratio = down / here.sigma
        step = kept * (ratio * x + (1 - ratio) * picture) + fresh * z
        yield Stage(timestep, here, grid.seen(x, here), (step, x, z), draws=True)
        x, saved, earlier, m, z = basis(3)
        share = (here.sigma - middle.sigma) / (here.sigma - there.sigma)
        path = math.sqrt(share) * earlier + math.sqrt(1 - share) * z
        down, kept, fresh = ancestral_split(here, there, grid.level)
        ratio = down / here.sigma
        step = kept * (ratio * saved + (1 - ratio) * denoised(x, m, middle, prediction)) + fresh * path
        between = grid.timestep_at(middle.sigma)
        yield Stage(between, middle, grid.seen(x, middle), (step, saved, earlier), draws=True)


def flow_lcm(grid: Discretization, _prediction: str) -> Iterator[Stage]:
    """Yield jumps to the picture and back to the next level with fresh noise."""
    for _, (timestep, here, there) in grid:
        x, m, z = basis(1)
        picture = x - here.sigma * m
        yield Stage(timestep, here, x, (there.alpha * picture + there.sigma * z,), draws=True)
