"""Samplers of distilled models: latent consistency, arXiv:2310.04378, and trajectory consistency, arXiv:2402.19159."""

from __future__ import annotations

import math
from collections.abc import Iterator

from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised, noise
from latentrt.runtime.samplers.walks import Walk

SIGMA_DATA = 0.5


def lcm(walk: Walk, prediction: str, *, timestep_scaling: float = 10.0) -> Iterator[Stage]:
    """Yield jumps to the picture and back to the next level with fresh noise; the last stays at the picture."""
    for k, (timestep, here, there) in walk:
        x, m, z = basis(1)
        scaled = timestep * timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        picture = scaled / math.hypot(scaled, SIGMA_DATA) * denoised(x, m, here, prediction) + skip * x
        last = k == len(walk.legs) - 1
        step = picture if last else there.alpha * picture + there.sigma * z
        yield Stage(timestep, here, x, (step,), draws=not last)


def tcd(walk: Walk, prediction: str, *, eta: float) -> Iterator[Stage]:
    """Yield jumps along the trajectory to s = (1 - eta) * next timestep, and back up to it with fresh noise."""
    for k, (timestep, here, there) in walk:
        x, m, z = basis(1)
        last = k == len(walk.legs) - 1
        target = walk.at(math.floor((1 - eta) * (0 if last else walk.legs[k + 1].timestep)))
        picture, direction = denoised(x, m, here, prediction), noise(x, m, here, prediction)
        step = target.alpha * picture + target.sigma * direction
        draws = eta > 0 and not last
        if draws:
            kept = (there.alpha / target.alpha) ** 2
            step = math.sqrt(kept) * step + math.sqrt(max(1 - kept, 0.0)) * z
        yield Stage(timestep, here, x, (step,), draws=draws)
