"""DDIM, arXiv:2010.02502."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from latentrt.engines.manifest import Prediction
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised, noise
from latentrt.runtime.schedules import Leg


def ddim(legs: Sequence[Leg], prediction: Prediction, *, eta: float) -> Iterator[Stage]:
    """Yield the stages of eqs. 12 and 16: eta 0 is deterministic, eta 1 has the noise of DDPM."""
    for timestep, here, there in legs:
        x, m, z = basis(1)
        ratio = (here.alpha / there.alpha) ** 2
        std = eta * there.sigma / here.sigma * math.sqrt(max(1 - ratio, 0.0))
        towards = math.sqrt(max(there.sigma**2 - std**2, 0.0))
        picture, direction = denoised(x, m, here, prediction), noise(x, m, here, prediction)
        step = there.alpha * picture + towards * direction + std * z
        yield Stage(timestep, here, x, (step,), draws=eta > 0)
