"""What a plan says, executed literally: the oracle for every other way to draw.

`SamplingPlan`'s docstring and classifier-free guidance as plain NumPy on arrays, with a function for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import SamplingPlan

Denoiser = Callable[[Array, Array], Array]
"""(latents (n, C, h, w) float32, timesteps (n,) float32) -> guided output (n, C, h, w)"""

Model = Callable[[Array, Array, Array], Array]
"""(latents, timesteps, text (n, T, D)) -> raw output (n, C, h, w)"""


def denoise(
    plan: SamplingPlan,
    noise: Array,
    denoiser: Denoiser,
    draw: Callable[[], Array],
    *,
    image: Array | None = None,
) -> Iterator[Array]:
    """Yield every picture's latents after each stage: (n, C, h, w), float32.

    image: clean latents to start from instead of noise alone
    """
    state = np.zeros((len(noise), plan.rows, *noise.shape[1:]), dtype=np.float32)
    if image is None:
        state[:, 0] = plan.initial_scale * noise
    else:
        state[:, 0] = plan.levels[0, 0] * image + plan.levels[0, 1] * noise
    for k in range(plan.stages):
        latents = np.einsum("r,nr...->n...", plan.input_rows[k], state)
        output = denoiser(latents, np.full(len(noise), plan.timesteps[k], dtype=np.float32))
        fresh = draw() if plan.draws_noise[k] else np.zeros_like(noise)
        state = advance(plan.transitions[k], state, output, fresh)
        yield state[:, 0].copy()


def advance(transition: Array, state: Array, output: Array, noise: Array) -> Array:
    """Return transition @ [state; output; noise] for every picture: the shape of the state, float32."""
    stack = np.concatenate([state, output[:, None], noise[:, None]], axis=1)
    return np.einsum("or,nr...->no...", transition, stack).astype(np.float32)


def guided(model: Model, text: Array, negative: Array | None, scale: float) -> Denoiser:
    """Wrap a model into a denoiser whose output is negative + scale * (text - negative)."""

    def denoiser(latents: Array, timesteps: Array) -> Array:
        positive = model(latents, timesteps, text)
        if negative is None:
            return positive
        other = model(latents, timesteps, negative)
        return np.asarray(other + np.float32(scale) * (positive - other), dtype=np.float32)

    return denoiser
