"""Euler and Euler ancestral in the variance-exploding picture, arXiv:2206.00364."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from latentrt.engines.manifest import Prediction
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised
from latentrt.runtime.schedules import Leg


def euler(legs: Sequence[Leg], prediction: Prediction) -> Iterator[Stage]:
    """Yield the stages of Algorithm 1 without its second-order correction."""
    for timestep, here, there in legs:
        x, m, _ = basis(1)
        slope = (x - denoised(x, m, here, prediction)) / here.sigma
        yield Stage(timestep, here, x / here.size, (x + (there.sigma - here.sigma) * slope,))


def euler_ancestral(legs: Sequence[Leg], prediction: Prediction) -> Iterator[Stage]:
    """Yield Euler steps that go below the next level and come back to it with fresh noise."""
    for timestep, here, there in legs:
        x, m, z = basis(1)
        down, up = ancestral_split(here.sigma, there.sigma)
        slope = (x - denoised(x, m, here, prediction)) / here.sigma
        yield Stage(timestep, here, x / here.size, (x + (down - here.sigma) * slope + up * z,), draws=True)


def ancestral_split(here: float, there: float) -> tuple[float, float]:
    """Return (down, up) with down² + up² = there², up the deviation of arXiv:2006.11239, eq. 7."""
    up = there * math.sqrt(max(here**2 - there**2, 0.0)) / here
    return math.sqrt(max(there**2 - up**2, 0.0)), up
