"""Rectified flow, arXiv:2209.03003 and arXiv:2403.03206: latents = (1 - sigma) * picture + sigma * noise.

The model's output is the velocity, noise - picture, and its input is the latents as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.walks import Walk


def flow_euler(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield straight steps along the velocity."""
    for _, (timestep, here, there) in walk:
        x, m, _ = basis(1)
        yield Stage(timestep, here, x, (x + (there.sigma - here.sigma) * m,))


def flow_heun(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield steps along the mean of the velocities at both ends; the last step has one evaluation."""
    for k, (timestep, here, there) in walk:
        width = there.sigma - here.sigma
        x, _, _, m, _ = basis(3)
        yield Stage(timestep, here, x, (x + width * m, x, m))
        if there.sigma == 0:
            continue
        x, saved, first, m, _ = basis(3)
        yield Stage(walk.legs[k + 1].timestep, there, x, (saved + width * (first + m) / 2, saved, first))


def flow_lcm(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield jumps to the picture and back to the next level with fresh noise."""
    for _, (timestep, here, there) in walk:
        x, m, z = basis(1)
        picture = x - here.sigma * m
        yield Stage(timestep, here, x, (there.alpha * picture + there.sigma * z,), draws=True)
