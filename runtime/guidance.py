"""Guidance as a matrix: the model runs on rows, and a picture's guided output is a weighted sum of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array

Denoiser = Callable[[Array, Array], Array]
"""(latents (n, C, h, w) float32, timesteps (n,) float32) -> guided output (n, C, h, w)"""

Model = Callable[[Array, Array, Array], Array]
"""(latents (rows, C, h, w), timesteps (rows,), text (rows, T, D)) -> raw output (rows, C, h, w)"""


def classifier_free(model: Model, text: Array, negative: Array | None, guidance: float) -> Denoiser:
    """Wrap a model into a denoiser whose output is negative + guidance * (text - negative), arXiv:2207.12598.

    text: (n, T, D); negative: the same, or None for no guidance. With guidance 1 the negative has no weight
    and is not computed: one row a picture, half the cost.
    Raises RequestError when the shapes differ.
    """
    if negative is None or guidance == 1:
        return lambda latents, timesteps: model(latents, timesteps, text)
    if negative.shape != text.shape:
        raise RequestError(f"negative prompt: found shape {negative.shape}, expected {text.shape}")
    rows = np.concatenate([negative, text])
    weights = guidance_matrix(len(text), guidance)

    def denoiser(latents: Array, timesteps: Array) -> Array:
        outputs = model(np.concatenate([latents, latents]), np.concatenate([timesteps, timesteps]), rows)
        return np.tensordot(weights, outputs, axes=1)

    return denoiser


def guidance_matrix(pictures: int, guidance: float) -> Array:
    """Return G of `guided = G @ outputs`, the negative rows first: (pictures, 2 * pictures), float32."""
    eye = np.eye(pictures, dtype=np.float32)
    return np.concatenate([np.float32(1 - guidance) * eye, np.float32(guidance) * eye], axis=1)
