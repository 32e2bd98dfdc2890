"""UniPC, arXiv:2302.04867: each evaluation first corrects the step that led to it, then predicts the next."""

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


def unipc(walk: Walk, prediction: str, *, order: int) -> Iterator[Stage]:
    """Yield the stages of Algorithms 5 and 6 (data prediction, B2): latents, the last corrected ones, past pictures."""
    for k, (timestep, here, there) in walk:
        x, saved, *past, m, _ = basis(2 + order)
        picture = denoised(x, m, here, prediction)
        corrected = x
        if k > walk.begin:
            degree = walk.order(k - 1, order)
            levels = [here, *(walk.legs[k - 1 - i].here for i in range(degree))]
            corrected = _update(saved, past[:degree], levels, arrived=picture)
        pictures = [picture, *past[: order - 1]]
        degree = walk.order(k, order)
        levels = [there, *(walk.legs[k - i].here for i in range(degree))]
        step = _update(corrected, pictures[:degree], levels, arrived=None)
        yield Stage(timestep, here, x, (step, corrected, *pictures))


def _update(x: Array, pictures: Sequence[Array], levels: Sequence[Level], *, arrived: Array | None) -> Array:
    """Return the latents at levels[0] from those at levels[1].

    pictures: newest first, taken at levels[1:]; arrived: the picture at levels[0], which makes it the corrector
    """
    goal, start, *earlier = levels
    h = goal.half_log_snr - start.half_log_snr
    shift = math.expm1(-h)  # B2(h), and h phi_1(h)
    ratios = [(level.half_log_snr - start.half_log_snr) / h for level in earlier]
    changes = [(old - pictures[0]) / r for old, r in zip(pictures[1:], ratios, strict=True)]
    step = goal.sigma / start.sigma * x - goal.alpha * shift * pictures[0]
    if arrived is not None:
        changes, ratios = [*changes, arrived - pictures[0]], [*ratios, 1.0]
    if not changes:
        return step
    return step - goal.alpha * shift * np.tensordot(_rhos(ratios, h, shift), np.stack(changes), axes=1)


def _rhos(ratios: Sequence[float], h: float, shift: float) -> Array:
    """Solve the order conditions, eq. 9: (len(ratios),), float64. One ratio has the solution 1/2 by convention."""
    if len(ratios) == 1:
        return np.array([0.5])
    phi, factorial, wanted = shift / -h - 1, 1, []
    for n in range(len(ratios)):
        wanted.append(phi * factorial / shift)
        factorial *= n + 2
        phi = phi / -h - 1 / factorial
    return moment_weights(ratios, wanted)
