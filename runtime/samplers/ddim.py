"""DDIM, arXiv:2010.02502, and DDPM, arXiv:2006.11239.

The predicted picture is not clipped: that is not linear, and latents of Stable Diffusion reach far beyond -1..1.
diffusers' classes clip unless the scheduler's config says `clip_sample: false`. The configs that Stable Diffusion was
published with say so, and its pipelines correct one that they are opened with; but a DDIMScheduler or DDPMScheduler
that is made of a PNDM config without the key clips, and then draws another picture (6 to 17 dB from ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised, noise
from latentrt.runtime.samplers.walks import Walk

Variance = Literal["fixed_small", "fixed_large"]
LEAST_VARIANCE = 1e-20  # the reference keeps DDPM's variance above this


def ddim(walk: Walk, prediction: str, *, eta: float) -> Iterator[Stage]:
    """Yield the stages of DDIM's eqs. 12 and 16: eta 0 is deterministic, eta 1 has the noise of DDPM."""
    for _, (timestep, here, there) in walk:
        x, m, z = basis(1)
        ratio = (here.alpha / there.alpha) ** 2
        std = eta * there.sigma / here.sigma * math.sqrt(max(1 - ratio, 0.0))
        towards = math.sqrt(max(there.sigma**2 - std**2, 0.0))
        picture, direction = denoised(x, m, here, prediction), noise(x, m, here, prediction)
        step = there.alpha * picture + towards * direction + std * z
        yield Stage(timestep, here, x, (step,), draws=eta > 0)


def ddpm(walk: Walk, prediction: str, *, variance: Variance = "fixed_small") -> Iterator[Stage]:
    """Yield the posterior means of DDPM's eq. 7, and deviations by one of its two variances."""
    for _, (timestep, here, there) in walk:
        x, m, z = basis(1)
        kept = (here.alpha / there.alpha) ** 2
        picture_weight = there.alpha * (1 - kept) / here.sigma**2
        latent_weight = math.sqrt(kept) * there.sigma**2 / here.sigma**2
        small = max((1 - kept) * there.sigma**2 / here.sigma**2, LEAST_VARIANCE)
        std = math.sqrt(small if variance == "fixed_small" else 1 - kept) if timestep > 0 else 0.0
        step = picture_weight * denoised(x, m, here, prediction) + latent_weight * x + std * z
        yield Stage(timestep, here, x, (step,), draws=timestep > 0)
