"""DPM-Solver++, arXiv:2211.01095."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from latentrt.engines.manifest import Prediction
from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.equations import denoised
from latentrt.runtime.schedules import Leg

FEW = 15  # below this many steps the last ones are of lower order, as the authors advise for stability


def dpmpp_2m(legs: Sequence[Leg], prediction: Prediction) -> Iterator[Stage]:
    """Yield the stages of Algorithm 2 (2M): state is the latents and the previous denoised picture."""
    for k, (timestep, here, there) in enumerate(legs):
        x, past, m, _ = basis(2)
        picture = denoised(x, m, here, prediction)
        first_order = k == 0 or there.sigma == 0 or (k == len(legs) - 1 and len(legs) < FEW)
        guess = picture if first_order else _extrapolate(picture, past, legs[k - 1 : k + 1])
        h = there.half_log_snr - here.half_log_snr
        step = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * guess
        yield Stage(timestep, here, x, (step, picture))


def _extrapolate(picture: Array, past: Array, legs: Sequence[Leg]) -> Array:
    before, (_, here, there) = legs
    r = (here.half_log_snr - before.here.half_log_snr) / (there.half_log_snr - here.half_log_snr)
    return picture + (picture - past) / (2 * r)
