"""Euler for models trained with EDM's preconditioning, arXiv:2206.00364, Table 1: they bring their own noise levels."""

from __future__ import annotations

import math
from collections.abc import Iterator

from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.walks import Walk

SIGMA_DATA = 0.5
SIGMA_ENDS = (80.0, 0.002)


def edm_euler(walk: Walk, prediction: str) -> Iterator[Stage]:
    """Yield Algorithm 1 without its correction; the model's output counts in units of its own, c_skip and c_out."""
    for _, (timestep, here, there) in walk:
        x, m, _ = basis(1)
        size = math.hypot(here.sigma, SIGMA_DATA)
        sign = -1 if prediction == "v_prediction" else 1
        picture = (SIGMA_DATA / size) ** 2 * x + sign * here.sigma * SIGMA_DATA / size * m
        slope = (x - picture) / here.sigma
        yield Stage(timestep, here, x / size, (x + (there.sigma - here.sigma) * slope,))
