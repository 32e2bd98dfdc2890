"""The denoising loop: it executes a plan and knows nothing of samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.guidance import Denoiser
from latentrt.runtime.plan import SamplingPlan


def denoise(
    plan: SamplingPlan,
    noise: Array,
    denoiser: Denoiser,
    draw: Callable[[], Array],
    *,
    image: Array | None = None,
) -> Iterator[Array]:
    """Yield every picture's latents after each stage: (n, C, h, w), float32, a fresh array each time.

    noise: (n, C, h, w), unit normal
    draw: called at the stages in which the sampler draws, returns unit normals of the same shape
    image: (n, C, h, w), clean latents to start from instead of noise alone
    """
    state = np.zeros((len(noise), plan.rows, *noise.shape[1:]), dtype=np.float32)
    state[:, 0] = plan.initial_scale * noise if image is None else blend(plan.levels[0], image, noise)
    silence = np.zeros_like(noise, dtype=np.float32)
    for stage in range(plan.stages):
        latents = np.einsum("r,nr...->n...", plan.input_rows[stage], state)
        output = denoiser(latents, np.full(len(noise), plan.timesteps[stage], dtype=np.float32))
        fresh = draw() if plan.draws_noise[stage] else silence
        state = advance(plan.transitions[stage], state, output, fresh)
        yield state[:, 0].copy()


def blend(level: Array, image: Array, noise: Array) -> Array:
    """Return the image at a noise level, one of `plan.levels`: the shape of the image, float32."""
    return np.asarray(level[0] * image + level[1] * noise, dtype=np.float32)


def advance(transition: Array, state: Array, output: Array, noise: Array) -> Array:
    """Return transition @ [state; output; noise] for every picture.

    transition: (R, R + 2); state: (n, R, C, h, w); output, noise: (n, C, h, w)
    returns: (n, R, C, h, w), float32
    """
    rows = np.concatenate([state, output[:, None], noise[:, None]], axis=1).astype(np.float32, copy=False)
    flat = transition @ rows.reshape(*rows.shape[:2], -1)
    return np.asarray(flat, dtype=np.float32).reshape(state.shape)
