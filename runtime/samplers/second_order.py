"""Samplers that evaluate the model twice a step: the second evaluation is a stage of its own.

All count in sigma; a step that ends at the clean picture has one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised
from latentrt.runtime.samplers.euler import ancestral_split, slope
from latentrt.runtime.samplers.walks import Walk
from latentrt.runtime.schedules import ve_level


def heun(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield Algorithm 1 of arXiv:2206.00364: an Euler step, then the mean of the slopes at its two ends."""
    for k, (timestep, here, there) in walk:
        width = there.sigma - here.sigma
        x, _, _, m, _ = basis(3)
        first = slope(x, m, here, prediction)
        yield Stage(timestep, here, x / here.size, (x + width * first, x, first))
        if there.sigma == 0:
            continue
        x, saved, first, m, _ = basis(3)
        mean = (first + slope(x, m, there, prediction)) / 2
        yield Stage(walk.legs[k + 1].timestep, there, x / there.size, (saved + width * mean, saved, first))


def kdpm2(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver-2, arXiv:2206.00927, in sigma: the slope at the middle, in log sigma, makes the step."""
    for _, (timestep, here, there) in walk:
        middle = ve_level(math.sqrt(here.sigma * there.sigma))
        x, _, m, _ = basis(2)
        half = x + (middle.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, x / here.size, (half, x))
        if there.sigma == 0:
            continue
        x, saved, m, _ = basis(2)
        step = saved + (there.sigma - here.sigma) * slope(x, m, middle, prediction)
        yield Stage(walk.timestep_at(middle.sigma), middle, x / middle.size, (step, saved))


def kdpm2_ancestral(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield kdpm2 steps that go below the next level and come back to it with fresh noise."""
    for _, (timestep, here, there) in walk:
        down, up = ancestral_split(here.sigma, there.sigma)
        middle = ve_level(math.sqrt(here.sigma * down))
        x, _, m, _ = basis(2)
        half = x + (middle.sigma - here.sigma) * slope(x, m, here, prediction)
        yield Stage(timestep, here, x / here.size, (half, x))
        if there.sigma == 0:
            continue
        x, saved, m, z = basis(2)
        step = saved + (down - here.sigma) * slope(x, m, middle, prediction) + up * z
        yield Stage(walk.timestep_at(middle.sigma), middle, x / middle.size, (step, saved), draws=True)


def dpmpp_2s_ancestral(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver++ (2S), arXiv:2211.01095, to below the next level, and back to it with fresh noise."""
    for _, (timestep, here, there) in walk:
        x, _, m, _ = basis(2)
        picture = denoised(x, m, here, prediction)
        if there.sigma == 0:
            yield Stage(timestep, here, x / here.size, (picture, x))
            continue
        down, up = ancestral_split(here.sigma, there.sigma)
        middle = ve_level(math.sqrt(here.sigma * down))
        ratio = middle.sigma / here.sigma
        yield Stage(timestep, here, x / here.size, (ratio * x + (1 - ratio) * picture, x))
        x, saved, m, z = basis(2)
        ratio = down / here.sigma
        step = ratio * saved + (1 - ratio) * denoised(x, m, middle, prediction) + up * z
        yield Stage(walk.timestep_at(middle.sigma), middle, x / middle.size, (step, saved), draws=True)


def dpmpp_sde(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield DPM-Solver++ (2S) with noise: to the middle in log sigma, and with its picture from start to end.

    Both moves of a step ride on one Brownian path in sigma, so the second one's noise contains the first one's.
    """
    for _, (timestep, here, there) in walk:
        x, _, unused, m, z = basis(3)
        picture = denoised(x, m, here, prediction)
        if there.sigma == 0:
            yield Stage(timestep, here, x / here.size, (picture, x, unused))
            continue
        middle = ve_level(math.sqrt(here.sigma * there.sigma))
        down, up = ancestral_split(here.sigma, middle.sigma)
        ratio = down / here.sigma
        yield Stage(timestep, here, x / here.size, (ratio * x + (1 - ratio) * picture + up * z, x, z), draws=True)
        x, saved, earlier, m, z = basis(3)
        share = (here.sigma - middle.sigma) / (here.sigma - there.sigma)
        path = math.sqrt(share) * earlier + math.sqrt(1 - share) * z
        down, up = ancestral_split(here.sigma, there.sigma)
        ratio = down / here.sigma
        step = ratio * saved + (1 - ratio) * denoised(x, m, middle, prediction) + up * path
        told = walk.timestep_at(middle.sigma)
        yield Stage(told, middle, x / middle.size, (step, saved, earlier), draws=True)
